"""What sites compute: Δh of each form and how it joins h. Shapes: x `[…, inputs]`, h `[…, outputs]`.

A site starts as the identity: what it gives is h, to the bit, until it has been trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from graft.adapters.expert_weight import Part, summed
from graft.adapters.low_rank import added
from graft.adapters.packed import plain_weight
from graft.adapters.places import Place, sizes
from graft.adapters.point import Point
from graft.errors import RequestError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def closed_gate(point: Point, *shape: int) -> nn.Parameter:
    """A gate of zero, of this shape, that learns as fast as `point` says."""
    gate = nn.Parameter(torch.zeros(shape))
    gate.rate = point.gate_rate  # type: ignore[attr-defined]
    return gate


class Site(nn.Module):
    """A point at a place: `site(h, x, weight)` is the new h. `module` is the frozen module h comes from."""

    formula: ClassVar[str]
    """Parameters at one place, in r (size), i (channels of x) and o (channels of h)."""
    module: nn.Module
    affine: ClassVar[bool] = True
    """Whether the new h is an affine function of h and x: what can be folded into a weight."""

    def __init__(self, point: Point, place: Place, module: nn.Module):
        super().__init__()
        self.point, self.place = point, place
        # not a submodule: the frozen weights are the model's
        self.__dict__["module"] = module
        self.after = point.insertion == "after"
        self.scale: Any = point.scale
        if point.composition == "scaled" and point.scale == "learned":
            self.scale = nn.Parameter(torch.ones(()))
        if point.composition == "gated":
            self.gate = closed_gate(point)

    def delta(self, source: torch.Tensor) -> torch.Tensor:
        """Δh `[…, outputs]` from x, or from h where the point is inserted after the module."""
        raise NotImplementedError

    def forward(self, h: torch.Tensor, x: torch.Tensor | None, weight: float = 1.0) -> torch.Tensor:
        """h with Δh, `weight` times. x may be None where the point is inserted after the module."""
        delta = self.matched(h if self.after or x is None else x, h)
        if self.point.composition == "gated":
            return h + weight * self.gate * (delta - h)
        if self.point.composition == "scaled":
            return h + weight * self.scale * delta
        return h + weight * delta if weight != 1.0 else h + delta

    def matched(self, source: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Δh in the dtype of h, worked out in that of the site's weights (full precision on a base in half)."""
        own = next(self.parameters()).dtype
        if source.dtype == own or torch.is_autocast_enabled(source.device.type):
            return self.delta(source)
        return self.delta(source.to(own)).to(h.dtype)

    @classmethod
    def count(cls, point: Point, inputs: int, outputs: int) -> int:
        """Parameters at a place of these sizes, by the formula."""
        r = point.size or 0
        extra = (point.scale == "learned") + (point.composition == "gated") + outputs * point.directions
        return cls.body(point, r, inputs, outputs) + extra

    @classmethod
    def body(cls, point: Point, r: int, i: int, o: int) -> int:
        """Parameters of the form alone."""
        raise NotImplementedError

    @property
    def inputs(self) -> int:
        """Channels of what Δh is made from."""
        return self.place.outputs if self.after else self.place.inputs


class LowRank(Site):
    """Δh = up(down(x)): LoRA (Hu et al. 2021) where x and h are those of one linear layer.

    `down [rank, inputs]`, `up [outputs, rank]`. PiSSA (Meng et al. 2024) starts both from the largest singular values
    of the weight and takes their first product away again, which leaves the frozen weight as it is. DoRA (Liu et al.
    2024) trains the length of each row of W + s·up·down as well: `magnitude [outputs]`.
    """

    formula = "r·(i + o)"
    first_down: torch.Tensor
    first_up: torch.Tensor

    def __init__(self, point: Point, place: Place, module: nn.Module):
        super().__init__(point, place, module)
        rank = checked_rank(point, place, self.inputs)
        self.down = nn.Parameter(torch.empty(rank, self.inputs))
        self.up = nn.Parameter(torch.zeros(place.outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up.rate = point.up_rate  # type: ignore[attr-defined]
        self.dropout = nn.Dropout(point.dropout) if point.dropout else None
        if (point.start == "pissa" or point.directions) and not place.single:
            raise RequestError(f"{place.path}: expected a single linear layer for PiSSA and DoRA, found a sublayer")
        if point.start == "pissa":
            self._largest()
        if point.directions:
            self.magnitude = nn.Parameter(self._lengths().clone())
        own = point.directions or point.start == "pissa" or point.scale == "learned" or point.composition == "gated"
        self.plain = not own
        """Whether it is h + s·up·down·x and nothing else."""

    @classmethod
    def body(cls, point: Point, r: int, i: int, o: int) -> int:
        return r * (i + o)

    @property
    def drops(self) -> bool:
        """Whether its dropout changes anything now: in training, or where another mask was put in its place."""
        return self.dropout is not None and (self.dropout.training or type(self.dropout) is not nn.Dropout)

    def weight(self) -> torch.Tensor:
        """The frozen weight `[outputs, inputs]`, float32."""
        return oriented(self.module).detach().float()

    @torch.no_grad()
    def _largest(self) -> None:
        """`down` and `up` from the largest singular values, with scale: s·up·down = their part of the weight."""
        rank, scale = self.down.shape[0], float(self.scale) if self.point.scale != "learned" else 1.0
        weight = self.weight()
        if not weight.is_meta:  # a skeleton has no values, but as many of them
            u, values, v = torch.linalg.svd(weight, full_matrices=False)
            root = (values[:rank] / abs(scale)).sqrt()
            self.down.copy_(root[:, None] * v[:rank])
            self.up.copy_(math.copysign(1.0, scale) * u[:, :rank] * root)
        self.register_buffer("first_down", self.down.detach().clone())
        self.register_buffer("first_up", self.up.detach().clone())

    def product(self) -> torch.Tensor:
        """up·down without what it started with: `[outputs, inputs]`."""
        product = self.up @ self.down
        return product - self.first_up @ self.first_down if self.point.start == "pissa" else product

    def delta(self, source: torch.Tensor) -> torch.Tensor:
        """up(down(x))."""
        source = source if self.dropout is None else self.dropout(source)
        delta = functional.linear(functional.linear(source, self.down), self.up)
        if self.point.start == "pissa":
            delta = delta - functional.linear(functional.linear(source, self.first_down), self.first_up)
        return delta

    def forward(self, h: torch.Tensor, x: torch.Tensor | None, weight: float = 1.0) -> torch.Tensor:
        if self.point.directions:
            return self._turned(h, x, weight)
        source = h if self.after or x is None else x
        alike = source.dtype == h.dtype == self.down.dtype
        if not self.plain or not alike or torch.is_autocast_enabled(h.device.type):
            return super().forward(h, x, weight)
        source = source if self.dropout is None else self.dropout(source)
        flat, wide = h.reshape(-1, h.shape[-1]), source.reshape(-1, source.shape[-1])
        return added(flat, wide, self.down, self.up, float(self.scale * weight)).view(h.shape)

    def _lengths(self) -> torch.Tensor:
        """Lengths of the rows of W + s·up·down `[outputs]`; no gradient goes through them (DoRA, section 4.3)."""
        with torch.no_grad():
            weight = self.weight()
            # a fresh site is made beside a model that may lie on another device, or on none
            turned = weight + float(self.scale) * self.product().float().to(weight.device)
            return turned.norm(dim=1).to(self.up.dtype)

    def _turned(self, h: torch.Tensor, x: torch.Tensor | None, weight: float) -> torch.Tensor:
        """m / |W + s·ΔW| · (W + s·ΔW) x, beside the bias. With m as it was, the factor is one to the bit."""
        assert x is not None
        bias = getattr(self.module, "bias", None)
        bare = h if bias is None else h - bias
        factor = self.magnitude / self._lengths()
        change = (factor - 1) * bare + factor * self.scale * self.matched(x, h)
        return h + (weight * change).to(h.dtype)


class ExpertLowRank(Site):
    """LoRA beside each of the experts whose matrices lie in one parameter, all of one rank.

    `down [experts, rank, inputs]`, `up [experts, outputs, rank]`. What it does to products of the parameter while the
    experts run is told by `part`; no module gives the h that `forward` would take.
    """

    formula = "e·r·(i + o)"

    def __init__(self, point: Point, place: Place, module: nn.Module):
        if why := point.not_at_experts():
            raise RequestError(f"{place.path}: {why}")
        super().__init__(point, place, module)
        rank = checked_rank(point, place, place.inputs)
        self.down = nn.Parameter(torch.empty(place.experts, rank, place.inputs))
        self.up = nn.Parameter(torch.zeros(place.experts, place.outputs, rank))
        bound = 1 / math.sqrt(place.inputs)  # as LowRank starts, for each expert
        nn.init.uniform_(self.down, -bound, bound)
        self.up.rate = point.up_rate  # type: ignore[attr-defined]
        self.dropout = nn.Dropout(point.dropout) if point.dropout else None

    @classmethod
    def body(cls, point: Point, r: int, i: int, o: int) -> int:
        return r * (i + o)

    def part(self, weight: float = 1.0) -> Part:
        """The change, `weight` times, in the orientation in which the experts lie."""
        turned = self.place.turned
        left, right = (self.down.mT, self.up.mT) if turned else (self.up, self.down)
        return Part(left, right, weight * self.scale, self.dropout)

    def weight(self) -> torch.Tensor:
        """The frozen parameter, as it lies."""
        return self.module.get_parameter(self.place.parameter)

    @torch.no_grad()
    def folded(self, before: torch.Tensor, weight: float) -> torch.Tensor:
        """`before`, the parameter or what earlier sites made of it, with the change, float32."""
        return summed(before.float(), [self.part(weight).each(torch.Tensor.float)])


def checked_rank(point: Point, place: Place, inputs: int) -> int:
    """The rank of a low-rank change. Raises RequestError for one above the layer's size."""
    rank = point.size or 1
    if rank > min(inputs, place.outputs):
        raise RequestError(
            f"{place.path}: expected a rank of at most {min(inputs, place.outputs)}, the layer's size "
            f"({inputs} → {place.outputs}), found {rank}: use a lower rank, or full tuning of this layer"
        )
    return rank


class Bottleneck(Site):
    """Δh = up(f(down(x))): the adapter of Houlsby et al. (2019). `down [width, inputs]`, `up [outputs, width]`."""

    formula = "r·(i + o)"
    affine = False

    def __init__(self, point: Point, place: Place, module: nn.Module):
        super().__init__(point, place, module)
        width = point.size or 1
        self.down = nn.Parameter(torch.empty(width, self.inputs))
        self.up = nn.Parameter(torch.zeros(place.outputs, width))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up.rate = point.up_rate  # type: ignore[attr-defined]
        self.down_bias = nn.Parameter(torch.zeros(width)) if point.biases else None
        self.up_bias = nn.Parameter(torch.zeros(place.outputs)) if point.biases else None
        self.dropout = nn.Dropout(point.dropout) if point.dropout else None
        self.activation = ACTIVATIONS[point.nonlinearity]

    @classmethod
    def body(cls, point: Point, r: int, i: int, o: int) -> int:
        return r * (i + o) + (r + o) * point.biases

    def delta(self, source: torch.Tensor) -> torch.Tensor:
        """up(f(down(x)))."""
        inner = self.activation(functional.linear(source, self.down, self.down_bias))
        inner = inner if self.dropout is None else self.dropout(inner)
        return functional.linear(inner, self.up, self.up_bias)


class Scale(Site):
    """h ⊙ (1 + factor): (IA)³ (Liu et al. 2022), held as the change, so that weight decay pulls to the identity."""

    formula = "o"

    def __init__(self, point: Point, place: Place, module: nn.Module):
        super().__init__(point, place, module)
        self.factor = nn.Parameter(torch.zeros(place.outputs))

    @classmethod
    def body(cls, point: Point, r: int, i: int, o: int) -> int:
        return o

    def delta(self, source: torch.Tensor) -> torch.Tensor:
        """h ⊙ factor."""
        return source * self.factor


class Bias(Site):
    """h + change: BitFit (Ben Zaken et al. 2022) where the module has a bias that the change adds to."""

    formula = "o"

    def __init__(self, point: Point, place: Place, module: nn.Module):
        super().__init__(point, place, module)
        self.change = nn.Parameter(torch.zeros(place.outputs))

    @classmethod
    def body(cls, point: Point, r: int, i: int, o: int) -> int:
        return o

    def delta(self, source: torch.Tensor) -> torch.Tensor:
        """The change alone."""
        return self.change


FORMS: dict[str, type[Site]] = {"linear": LowRank, "bottleneck": Bottleneck, "scale": Scale, "bias": Bias}


def made(point: Point, place: Place, module: nn.Module) -> Site:
    """A fresh site of a point that hangs on a module, at a place.

    Raises RequestError for a rank above the layer's size, and for what cannot stand at fused experts.
    """
    cls = ExpertLowRank if place.parameter else FORMS[point.form]
    return cls(point, place, module)


def oriented(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as `[outputs, inputs]`, whichever way it holds it."""
    weight = plain_weight(module)
    found = sizes(module)
    transposed = found is not None and type(module).__name__ == "Conv1D"
    return weight.t() if transposed else weight
