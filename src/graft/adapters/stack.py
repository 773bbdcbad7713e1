"""How adapters sit in a model: sites at places, switched, stacked and averaged at run time, or each row its own.

The model's modules and their names stay as they are; sites hang on them by hooks and hold their weights apart, in
`model.graft_adapters`. A model with adapters is of a subclass of its class that saves only them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.adapters.composed import Again, Inverse, Invertible, check_no_mixture, ends, fusions
from graft.adapters.expert_junction import ExpertJunction, check_by_rows
from graft.adapters.forms import FORMS, Site, made
from graft.adapters.junction import Junction
from graft.adapters.mixture import Mixed, Mixer, Twice, mixed
from graft.adapters.places import Layout, Place
from graft.adapters.point import JOINING, Point, with_weights
from graft.adapters.positions import check_positions, taken_by
from graft.adapters.sites import Sites
from graft.errors import RequestError, UnknownName
from graft.products import quick_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.adapters.keys import Keys, Reader, TokenSite

NAME = "graft_adapters"
"""The attribute of a model that holds its adapters."""

Active = Sequence[str] | Mapping[str, float] | str | None


class Adapters(nn.Module):
    """All adapters of one model, by name. `active` are those that run, in order, each with a weight."""

    def __init__(self, model: PreTrainedModel, base: Path | None = None):
        super().__init__()
        self.sites = Sites()
        self.points: dict[str, list[Point]] = {}
        self.active: list[tuple[str, float]] = []
        self.rows: list[str | None] | None = None
        self.junctions: dict[str, Junction | ExpertJunction] = {}
        self.seen: dict[str, torch.Tensor] | None = None
        self.slots: dict[str, Keys] = {}
        self.reader: Reader | None = None
        self.twice: Twice | None = None
        self.was: str | None = None
        """How the model computed attention before it had learned keys."""
        self.base = base
        """Folder of the frozen model, which a saved adapter names."""

    def add(self, model: PreTrainedModel, name: str, points: Sequence[Point]) -> None:
        """Put a fresh adapter into `model`, trainable and the only active one.

        Raises RequestError for a place that is not there, a rank above a layer's size, more learned tokens than the
        model has positions for, or a name that is taken.
        """
        if name in self.points or not name or "." in name or "/" in name:
            raise RequestError(f"expected a new name without dots and slashes for an adapter, found {name!r}")
        if not points:
            raise RequestError(f"expected a point or more for the adapter {name!r}, found none")
        layout = Layout(model)
        points = [self._resolved(point) for point in points]
        check_positions(model, points)
        found = [site for point in points for site in self._made(model, layout, name, point)]
        sites = Sites()
        for point in points:
            if point.form in ("softmax", "tokens"):
                self._add_keys(model, layout, name, point, sites)
        for site in found:
            if isinstance(site, Mixed):
                sites["classifier"] = site.mixer
            if isinstance(site, Site):
                sites[site_key(site.place, sites)] = site
            self._hang(model, name, site)
        self.sites[name] = sites
        self.points[name] = points
        sites.to(model.device, model.dtype).train(model.training)
        self.use(name)

    def _resolved(self, point: Point) -> Point:
        """A fusion or mixture with the names of the adapters it is of: those that are active, if it names none."""
        if point.form not in JOINING:
            return point
        names = point.of or [name for name, _ in self.active]
        for name in names:
            self._check(name)
        if len(names) < 2:
            wish = "fuse" if point.form == "fusion" else "mix"
            raise RequestError(f"expected two adapters or more to {wish}, found {', '.join(names) or 'none'}")
        if point.form == "fusion":
            check_no_mixture({name: self.points[name] for name in names})
        return point.model_copy(update={"of": names})

    def _made(self, model: PreTrainedModel, layout: Layout, name: str, point: Point) -> list[Any]:
        """Fresh sites of a point, those that hang on modules."""
        if point.form == "fusion":
            return list(fusions(point, self.junctions.values()))
        if point.form == "mixture":
            return list(mixed(self, model, name, point))
        if point.form == "invertible":
            (inside, *others), outside = ends(layout)
            site = Invertible(point, inside, layout.modules[inside.target])
            more = [Again(site, other, layout.modules[other.target]) for other in others]
            return [site, *more, Inverse(site, outside, layout.modules[outside.target])]
        if point.form not in FORMS:
            return []
        return [made(point, place, layout.modules[place.target]) for place in layout.places(point)]

    def _add_keys(self, model: PreTrainedModel, layout: Layout, name: str, point: Point, sites: Sites) -> None:
        """Learned keys, or tokens that the model makes keys of, in front of attention."""
        from graft.adapters.keys import SLOT, Keys, KeySite, Reader, TokenFront, TokenSite, attention_modules, wanted

        if self.was is None:
            self.was = model.config._attn_implementation
        bodies = model.get_encoder() if model.config.is_encoder_decoder else model
        found = attention_modules(model, moving=point.shift or point.form == "tokens")
        chosen = wanted(found, layout, point)
        fronts: list[Any]
        if point.form == "tokens":
            inside = {id(module) for module in bodies.modules()}
            chosen = {path: shape for path, shape in chosen.items() if id(layout.modules[path]) in inside}
            site = TokenSite(point, model, list(chosen.values()))
            sites["input" if "input" not in sites else f"input/{len(sites)}"] = site
            fronts = [TokenFront(site, place) for place in range(len(chosen))]
        else:
            fronts = [KeySite(point, shapes) for shapes in chosen.values()]
            for path, front in zip(chosen, fronts, strict=True):
                sites[f"{path.replace('.', '/')}/keys"] = front
        for path, front in zip(chosen, fronts, strict=True):
            held = layout.modules[path].__dict__
            held[SLOT] = held.get(SLOT) or Keys(self)
            held[SLOT].fronts.setdefault(name, []).append(front)
            self.slots[path] = held[SLOT]
        if self.reader is None:
            self.reader = Reader(self, model)
        if point.form == "tokens":
            try:
                self.reader.check(name, site.to(model.device))
            except RequestError:
                self._forget_keys(name)
                raise

    def _hang(self, model: PreTrainedModel, name: str, site: Any) -> None:
        place = site.place
        key = f"{place.source}>{place.target}{'<' if place.before else ''}{' experts' if place.parameter else ''}"
        if key not in self.junctions:
            self.junctions[key] = (ExpertJunction if place.parameter else Junction)(self, model, place)
        self.junctions[key].sites.setdefault(name, []).append(site)

    def use(self, active: Active) -> None:
        """Switch: a name, several (stacked, in this order), names with weights (each change times its weight), or None
        for the bare model.

        Raises UnknownName for an adapter that is not there, RequestError for weights that are no numbers.
        """
        pairs = with_weights(active)
        for name, _ in pairs:
            self._check(name)
        self.active, self.rows = pairs, None

    def _check(self, name: str) -> None:
        if name not in self.points:
            raise UnknownName("adapter", name, list(self.points))

    @contextmanager
    def using(self, active: Active) -> Iterator[None]:
        """Inside, the adapters that `use` would take."""
        before = self.active, self.rows
        self.use(active)
        try:
            yield
        finally:
            self.active, self.rows = before

    @contextmanager
    def watching(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, the last shares that fusions gave their adapters: by place, `[batch, length, adapters]`."""
        seen: dict[str, torch.Tensor] = {}
        self.seen = seen
        try:
            yield seen
        finally:
            self.seen = None

    @contextmanager
    def each_row(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of a batch is read with the adapter `names[i]` (None: without any), products as in training.

        Raises UnknownName for an adapter that is not there, RequestError for one on experts, and for one name in
        the place of a list.
        """
        if isinstance(names, str):
            raise RequestError(f"expected a list with a name for each row, found {names!r}")
        for name in names:
            if name is not None:
                self._check(name)
                check_by_rows(name, self.junctions.values())
        before, self.rows = self.rows, list(names)
        try:
            with quick_layers():
                yield
        finally:
            self.rows = before
            for junction in self.junctions.values():
                junction.gathered = None

    def train_only(self, model: PreTrainedModel, name: str | None) -> None:
        """Freeze everything but the adapter `name` (None: everything), and the experts that it trains."""
        model.requires_grad_(False)
        for one in [name, *self.experts_trained_with(name)] if name is not None else []:
            self.sites[one].requires_grad_(True)

    def experts_trained_with(self, name: str) -> list[str]:
        """Adapters that are experts of the adapter `name` and trained along."""
        return [one for point in self.points[name] if point.mixture and point.mixture.train_experts for one in point.of]

    def keyed(self) -> list[str]:
        """Active adapters that have learned keys or tokens."""
        return [n for n, _ in self.active if any(p.form in ("softmax", "tokens") for p in self.points[n])]

    def running(self) -> list[str]:
        """Adapters that the next call runs, each once."""
        names = [name for name, _ in self.active] if self.rows is None else [n for n in self.rows if n is not None]
        return list(dict.fromkeys(names))

    def mixers(self) -> list[Mixer]:
        """Mixtures of experts that the next call runs."""
        if self.twice is None:
            return []
        return [site for name in self.running() for site in self.sites[name].values() if isinstance(site, Mixer)]

    def rows_of(self, name: str | None, count: int) -> torch.Tensor:
        """Which of `count` rows are read with `name`; beams and tokens may have multiplied those that were named.

        Raises RequestError where the rows do not fit the names.
        """
        names = self.rows or []
        if not names or count % len(names):
            raise RequestError(f"expected a batch of {len(names)} rows, one for each adapter named, found {count}")
        times = count // len(names)
        return torch.tensor([i * times + k for i, n in enumerate(names) if n == name for k in range(times)])

    def tokens(self, name: str) -> list[TokenSite]:
        """Learned tokens of an adapter."""
        return [site for site in self.sites[name].values() if hasattr(site, "embeddings")]

    def slots_of(self, site: TokenSite) -> list[Keys]:
        """The attention modules that see these tokens, in the model's order."""
        fronts = [(slot, front) for slot in self.slots.values() for each in slot.fronts.values() for front in each]
        return [slot for slot, front in fronts if getattr(front, "site", None) is site]

    def positions(self, name: str) -> int:
        """Positions that an adapter's learned keys and tokens take before the text."""
        return taken_by(self.points[name])

    def taken(self, model: PreTrainedModel) -> int:
        """Positions that the active adapters take before the text."""
        return sum(self.positions(name) for name, _ in self.active)

    def drop(self, name: str) -> None:
        """Take one adapter out. Raises UnknownName where it is not there, RequestError where a fusion listens to it."""
        self._check(name)
        listening = [other for other, points in self.points.items() if any(name in point.of for point in points)]
        if listening:
            first = listening[0]
            form = next(point.form for point in self.points[first] if name in point.of)
            raise RequestError(f"{first} is a {form} of {name} with others and would miss it: leave out {first} first")
        del self.sites[name], self.points[name]
        for junction in self.junctions.values():
            junction.sites.pop(name, None)
        self._forget_keys(name)
        self.active = [(other, weight) for other, weight in self.active if other != name]

    def _forget_keys(self, name: str) -> None:
        for slot in self.slots.values():
            slot.fronts.pop(name, None)

    def release(self, model: PreTrainedModel) -> None:
        """Undo what the adapters changed in the model beside hooks on modules."""
        if self.reader is not None:
            for handle in self.reader.handles:
                handle.remove()
        if self.twice is not None:
            self.twice.release()
        for path in self.slots:
            model.get_submodule(path).__dict__.pop("graft_keys", None)
        if self.was is not None:
            model.set_attn_implementation(self.was)

    def count(self, name: str) -> int:
        """Trained numbers of an adapter."""
        return sum(p.numel() for p in self.sites[name].parameters())


def free_name(name: str, taken: Iterable[str]) -> str:
    """`name`, with a number behind it where it is taken."""
    held = set(taken)
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(held) + 3))) if n not in held)


def site_key(place: Place, taken: Sites) -> str:
    """A name for a site that a module may have: slashes for dots, numbered where a place has several."""
    key = place.path.replace(".", "/") + ("/before" if place.before else "")
    return key if key not in taken else f"{key}/{sum(other.startswith(key) for other in taken)}"


class Adapted:
    """Mixed into the class of a model that has adapters: saving it saves them, with the name of the frozen model."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the adapters' folder; see `graft.adapters.folder.save`."""
        from graft.adapters.folder import save

        save(self, Path(save_directory), seen_from=kwargs.get("seen_from"))  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def adapted_class(cls: type) -> type:
    """`cls` with `Adapted`, under the same name."""
    return cls if issubclass(cls, Adapted) else type(cls.__name__, (Adapted, cls), {"__module__": cls.__module__})


def carried(model: PreTrainedModel, head: PreTrainedModel) -> PreTrainedModel:
    """`head`, which shares the body of `model`, as a model with the adapters that hang on it."""
    from graft.adapters.foreign import HOLDER

    stack = adapters_of(model)
    if stack is not None:
        head.add_module(NAME, stack)
    if HOLDER in model.__dict__:
        head.__dict__[HOLDER] = model.__dict__[HOLDER]
    head.__class__ = adapted_class(type(head))  # type: ignore[arg-type]
    return head


def adapters_of(model: Any) -> Adapters | None:
    """The adapters of a model; None where it has none."""
    return getattr(model, NAME, None)


def adopt(
    model: PreTrainedModel, points: Sequence[Point], name: str = "adapter", *, base: Path | str | None = None
) -> Adapters:
    """Put a fresh adapter into `model` (in place) and freeze everything else.

    `base` is the folder the model was loaded from, which a saved adapter names; needed for saving only. Adapters that
    are there already stay, frozen, and run before it. Raises RequestError for places that are not there.
    """
    stack = adapters_of(model)
    if stack is None:
        stack = Adapters(model, Path(base) if base is not None else None)
        model.add_module(NAME, stack)
        model.__class__ = adapted_class(type(model))  # type: ignore[arg-type]
    earlier = list(stack.active)
    stack.add(model, name, points)
    fused = {other for point in stack.points[name] for other in point.of}
    stack.active = [*(pair for pair in earlier if pair[0] not in fused), (name, 1.0)]
    stack.train_only(model, name)
    return stack
