"""Sites that are more than one Δh at one place: attention over several adapters, and adapters that are undone again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from graft.adapters.expert_junction import ExpertJunction
from graft.adapters.forms import ACTIVATIONS, Site
from graft.adapters.places import Layout, Place, sizes
from graft.adapters.point import Point
from graft.errors import RequestError

if TYPE_CHECKING:
    from graft.adapters.junction import Junction


class Fusion(Site):
    """AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247): h + Σₙ αₙ V δₙ over the changes δₙ of n adapters.

    αₙ = softmaxₙ(Q h · K δₙ), for each token; `query`, `key`, `value [channels, channels]`. Q starts at zero and V as
    the identity: at first it is the mean of the adapters' changes.
    """

    formula = "3·o²"
    affine = False
    junction: Junction

    def __init__(self, point: Point, place: Place, module: nn.Module, junction: Junction, names: list[str]):
        super().__init__(point, place, module)
        self.__dict__["junction"], self.names = junction, names
        size = place.outputs
        self.query = nn.Parameter(torch.zeros(size, size))
        self.key = nn.Parameter(torch.randn(size, size) * size**-0.5)
        self.value = nn.Parameter(torch.eye(size))

    @classmethod
    def body(cls, point: Point, r: int, i: int, o: int) -> int:
        return 3 * o * o

    def forward(self, h: torch.Tensor, x: torch.Tensor | None, weight: float = 1.0) -> torch.Tensor:
        changes = torch.stack([self.junction.changed(name, h, x) - h for name in self.names], -2)
        asked = functional.linear(h, self.query)[..., None, :]
        shares = (asked * functional.linear(changes, self.key)).sum(-1).softmax(-1)
        if self.junction.stack.seen is not None:
            self.junction.stack.seen[self.place.path] = shares.detach()
        return h + weight * functional.linear((shares[..., None] * changes).sum(-2), self.value)


def check_no_mixture(adapters: Mapping[str, Iterable[Point]]) -> None:
    """Raises RequestError for a mixture of experts among adapters that are to be fused, each with its points."""
    if found := next((name for name, points in adapters.items() if any(p.form == "mixture" for p in points)), None):
        raise RequestError(
            f"{found} is a mixture of experts, whose scalings are those of the model that reads with it, and cannot be "
            "fused: fuse its experts, or leave it out"
        )


def fusions(point: Point, junctions: Iterable[Junction | ExpertJunction]) -> Iterator[Fusion]:
    """A site wherever two of the adapters meet. Raises RequestError where none do, and for LoRA on fused experts."""
    meet = False
    for junction in junctions:
        names = [name for name in point.of if name in junction.sites]
        if isinstance(junction, ExpertJunction):
            if names:
                raise RequestError(
                    f"{names[0]} changes {junction.place.target}, whose experts lie in one parameter: what it does "
                    "there is not seen apart from what they compute, and cannot be fused; leave it out"
                )
        elif len(names) > 1:
            meet = True
            yield Fusion(point, junction.place, junction.sites[names[0]][0].module, junction, names)
    if not meet:
        raise RequestError(
            f"expected adapters that change the same places to fuse, found that {', '.join(point.of)} do not meet: "
            "learned keys are not fused, other points are where they hang on the same modules"
        )


class Invertible(Site):
    """An additive coupling of the two halves of the embeddings, undone before the head (MAD-X, Pfeiffer et al. 2020).

    o₁ = e₁ + F(e₂), o₂ = e₂ + G(o₁); both functions are bottlenecks whose `up` starts at zero.
    """

    formula = "2·r·o"
    affine = False

    def __init__(self, point: Point, place: Place, module: nn.Module):
        super().__init__(point, place, module)
        width, half = point.size or 1, place.outputs // 2
        if place.outputs % 2:
            raise RequestError(
                f"{place.path}: an invertible adapter needs an even number of channels, found {place.outputs}"
            )
        self.first_down, self.second_down = (nn.Parameter(torch.randn(width, half) * half**-0.5) for _ in range(2))
        self.first_up, self.second_up = (nn.Parameter(torch.zeros(half, width)) for _ in range(2))
        self.activation = ACTIVATIONS[point.nonlinearity]

    @classmethod
    def body(cls, point: Point, r: int, i: int, o: int) -> int:
        return 2 * r * o

    def _f(self, half: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.activation(functional.linear(half, self.first_down)), self.first_up)

    def _g(self, half: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.activation(functional.linear(half, self.second_down)), self.second_up)

    def forward(self, h: torch.Tensor, x: torch.Tensor | None, weight: float = 1.0) -> torch.Tensor:
        first, second = h.chunk(2, -1)
        first = first + weight * self._f(second)
        return torch.cat([first, second + weight * self._g(first)], -1)

    def inverse(self, h: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """What `forward` made h of."""
        first, second = h.chunk(2, -1)
        second = second - weight * self._g(first)
        return torch.cat([first - weight * self._f(second), second], -1)


class Inverse:
    """An invertible site as the head sees it: undone."""

    affine = False

    def __init__(self, site: Invertible, place: Place, module: nn.Module):
        self.site, self.place, self.module, self.point = site, place, module, site.point

    def forward(self, h: torch.Tensor, x: torch.Tensor | None, weight: float = 1.0) -> torch.Tensor:
        """The inverse of the site."""
        return self.site.inverse(h, weight)

    __call__ = forward


class Again:
    """A site at another place, with the same weights."""

    affine = False

    def __init__(self, site: Invertible, place: Place, module: nn.Module):
        self.site, self.place, self.module, self.point = site, place, module, site.point

    def forward(self, h: torch.Tensor, x: torch.Tensor | None, weight: float = 1.0) -> torch.Tensor:
        """What the site does."""
        return self.site(h, x, weight)

    __call__ = forward


def ends(layout: Layout) -> tuple[list[Place], Place]:
    """(what embeddings give, what the head reads). Raises RequestError where the model has no such head.

    Translators have an embedding each for encoder and decoder with the weight of a third, which names the place.
    """
    model: Any = layout.model
    paths = {id(module): path for path, module in layout.modules.items()}
    head = model.get_output_embeddings()
    if head is None or id(head) not in paths:
        raise RequestError(
            f"{type(model).__name__}: an invertible adapter needs a head over the vocabulary, found none"
        )
    table, outside = model.get_input_embeddings(), paths[id(head)]
    size = table.weight.shape[-1]
    same = [module for module in layout.modules.values() if isinstance(module, nn.Embedding)]
    tables = [table, *(module for module in same if module.weight is table.weight and module is not table)]
    read = sizes(head)
    if read is not None and read[0] != size:
        raise RequestError(
            f"{type(model).__name__}: an invertible adapter needs a head that reads as many channels as embeddings "
            f"give, found {read[0]} and {size}: use pfeiffer"
        )
    inside = [Place(path, path, path, size, size) for path in (paths[id(module)] for module in tables)]
    return inside, Place(outside, outside, outside, size, size, before=True)
