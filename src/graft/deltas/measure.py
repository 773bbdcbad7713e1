"""Task vectors (δ = θ − θ₀) by layer: how long they are, how far they agree, where their signs contradict each other.

One pass over the files, a piece at a time; nothing of the size of a model is held.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.checkpoint import FLOATS
from graft.progress import Progress

if TYPE_CHECKING:
    from graft.merge.stream import Tensors

KINDS = {
    "attention": ("attn", "attention"),
    "feed-forward": ("mlp", "fc1", "fc2", "intermediate", "output.dense", "ffn", "feed_forward", "experts"),
    "norms": ("norm", "ln_"),
    "embeddings": ("embed", "wte", "wpe", "lm_head", "shared"),
}
"""What a tensor belongs to, by words in its name; norms before the block they stand in."""
LARGEST = 0.2
"""Share of the largest values whose weight in a task vector is told."""
SAMPLE = 1 << 14
"""Values of each tensor that this is told by."""
RUN = 1 << 12
"""Values that lie side by side in a sample of a tensor."""


@dataclass(frozen=True)
class Sums:
    """What is added up over the pieces of tensors; `n` models."""

    elements: int
    base: float
    """Sum of θ₀²."""
    gram: np.ndarray
    """[n, n] float64: sums of δₘ·δₖ."""
    shared: int
    """Elements that two models or more changed."""
    conflicts: int
    """Those of them in which not all changes have one sign."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.elements + other.elements,
            self.base + other.base,
            self.gram + other.gram,
            self.shared + other.shared,
            self.conflicts + other.conflicts,
        )

    def standing_for(self, elements: int) -> Sums:
        """As if what was seen went on alike over so many elements."""
        if elements == self.elements:
            return self
        times = elements / self.elements
        shared, conflicts = round(times * self.shared), round(times * self.conflicts)
        return Sums(elements, times * self.base, times * self.gram, shared, conflicts)


@dataclass(frozen=True)
class Part:
    """One kind of tensors of one layer (None: outside of the layers)."""

    layer: int | None
    kind: str
    elements: int
    relative: list[float]
    """‖δ‖ / ‖θ₀‖ of each model."""
    cosines: list[list[float | None]]
    """Between the task vectors, [models, models]; None where one of them is 0."""
    conflicts: float | None
    """Share of the elements changed by two models or more in which the signs contradict; None where there are none."""


@dataclass(frozen=True)
class Deltas:
    """The task vectors of `models` from `base`: as a whole, and part by part."""

    base: str
    models: list[str]
    whole: Part
    parts: list[Part]
    largest: list[float]
    """Share of ‖δ‖² that the largest fifth of the values holds, by a sample of every tensor: near 1, trimming costs
    nothing."""
    by_chance: float
    """The conflicts that independent changes in all elements would have: 1 − 2^(1−n)."""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], base: str, models: Sequence[str]) -> Deltas:
        """Of `plain()`, with the names that base and models have now."""
        parts = [Part(**part) for part in plain["parts"]]
        own = {"base": base, "models": list(models), "whole": Part(**plain["whole"]), "parts": parts}
        return cls(**{**plain, **own})


def deltas(
    base: Path | str,
    models: Mapping[str, Path | str],
    *,
    sample: int | None = None,
    adapters_of: Path | None = None,
) -> Deltas:
    """Reads base and models once; with `sample` so many values of each tensor at most, in runs spread over it, from
    which the whole is judged. An adapter in the form of peft is the model that it makes of the one it names, of
    `adapters_of` where that is given, else of the base.

    Raises CannotCombine where their tensors do not correspond, and CheckpointError for damaged weights, NaN and Inf.
    """
    from graft.merge.inputs import inputs
    from graft.merge.preflight import layout
    from graft.merge.stream import Source, Tensors, Workers
    from graft.merge.task_arithmetic import Settings

    below, under = (free_name(word, models) for word in ("base", "adapters_of"))
    said = {"adapters_of": under} if adapters_of is not None else {}
    settings = Settings.model_validate({"base": below, "models": list(models), "anyway": True, **said})
    folders = {below: Path(base), **{name: Path(folder) for name, folder in models.items()}}
    if adapters_of is not None:
        folders[under] = adapters_of
    plan = layout(settings, folders)
    found: dict[tuple[int | None, str], list[Sums]] = {}
    samples: list[list[np.ndarray]] = [[] for _ in models]
    with ExitStack() as opened:
        readers = {n: opened.enter_context(part.open()) for n, part in inputs(settings, folders).items()}
        workers = opened.enter_context(Workers())
        floats = [name for name, (dtype, _) in plan.tensors.items() if dtype in FLOATS]
        with Progress("comparing", len(floats), "tensors") as progress:
            for name in floats:
                places = {model: Source(model, readers[model], place) for model, place in plan.places[name].items()}
                shape = plan.tensors[name][1]
                tensors = Tensors(name, shape, [places[m] for m in models], places[below], workers)
                found.setdefault(placed(name), []).extend(_measured(tensors, sample))
                for held, delta in zip(samples, tensors.read(0, min(SAMPLE, tensors.count)).deltas(), strict=True):
                    held.append(np.square(delta.numpy().astype(np.float64)))
                progress.advance(1)
    sums = {place: reduce(Sums.__add__, each) for place, each in found.items() if each}
    parts = [_part(*place, each) for place, each in sorted(sums.items(), key=_order)]
    total = _part(None, "all", reduce(Sums.__add__, sums.values()))
    notes = {} if sample is None else {"sample": sample}
    largest = [_held(each) for each in samples]
    return Deltas(str(base), list(models), total, parts, largest, 1 - 2.0 ** (1 - len(models)), notes)


def free_name(word: str, taken: Collection[str]) -> str:
    """The word, lengthened until nothing else is called so."""
    while word in taken:
        word += "_"
    return word


def placed(name: str) -> tuple[int | None, str]:
    """(layer, kind) of a tensor by its name: `model.layers.3.mlp.up_proj.weight` → (3, "feed-forward")."""
    layer = re.search(r"\.(\d+)\.", name)
    kinds = ("norms", "attention", "feed-forward", "embeddings")
    kind = next((kind for kind in kinds if any(word in name for word in KINDS[kind])), "other")
    return (int(layer[1]) if layer else None), kind


def _measured(tensors: Tensors, sample: int | None) -> list[Sums]:
    """Those of the whole tensor; none where it is empty."""
    pieces = tensors.workers.map(lambda span: _sums(tensors.read(*span)), _spans(tensors, sample))
    return [reduce(Sums.__add__, pieces).standing_for(tensors.count)] if pieces else []


def _spans(tensors: Tensors, sample: int | None) -> list[tuple[int, int]]:
    """(first element, number) of what is read of a tensor: all pieces, or runs evenly over it."""
    if sample is None or tensors.count <= sample:
        return tensors.spans()
    run = min(RUN, sample)
    starts = np.linspace(0, tensors.count - run, max(sample // run, 1)).astype(np.int64)
    return [(int(start), run) for start in starts]


def _order(item: tuple[tuple[int | None, str], Sums]) -> tuple[int, str]:
    (layer, kind), _ = item
    return (-1 if layer is None else layer), kind


def _sums(piece: Any) -> Sums:
    import torch

    base = float(piece.base.double().square().sum())
    stacked = torch.stack(piece.deltas())
    wide = stacked.double()
    rising, falling = (stacked > 0).sum(0), (stacked < 0).sum(0)
    shared = (rising + falling) >= 2
    conflicts = shared & (rising > 0) & (falling > 0)
    return Sums(len(piece), base, (wide @ wide.T).numpy(), int(shared.sum()), int(conflicts.sum()))


def _part(layer: int | None, kind: str, sums: Sums) -> Part:
    lengths = np.sqrt(np.diag(sums.gram))
    cosines: list[list[float | None]] = [
        [float(sums.gram[i, j] / (a * b)) if a and b else None for j, b in enumerate(lengths)]
        for i, a in enumerate(lengths)
    ]
    relative = [float(length / max(np.sqrt(sums.base), 1e-30)) for length in lengths]
    conflicts = sums.conflicts / sums.shared if sums.shared else None
    return Part(layer, kind, sums.elements, relative, cosines, conflicts)


def _held(squares: Sequence[np.ndarray]) -> float:
    """Share of the whole that the largest fifth holds."""
    values = np.sort(np.concatenate(squares))[::-1]
    total = float(values.sum())
    return float(values[: max(round(LARGEST * len(values)), 1)].sum()) / total if total else 1.0
