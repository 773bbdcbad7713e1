"""A LoRA adapter out of a tuned model: the best factors of its difference from the base, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graft.errors import CannotCombine
from graft.merge.settings import DeltaSettings
from graft.merge.slices import LAYER
from graft.settings import ModelRef

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from graft.checkpoint import Headers, TensorReader
    from graft.merge._factors import Pair
    from graft.merge.preflight import Layout
    from graft.merge.stream import Source
    from graft.verb import Job


class Settings(DeltaSettings):
    """`δ ≈ B A` for every linear layer, of the rank or the share of δ's squared norm that is asked for."""

    method: Literal["extract_lora"] = "extract_lora"
    makes: ClassVar[Literal["model", "adapter"]] = "adapter"
    models: Annotated[list[ModelRef], Field(min_length=1, max_length=1, description="The tuned model.")]
    rank: Annotated[int | None, Field(ge=1, description="Largest rank; with `energy`, fewer where that suffices.")] = (
        None
    )
    energy: Annotated[
        float | None, Field(gt=0, le=1, description="Share of each difference's squared norm that is kept.")
    ] = None
    on: Annotated[
        list[str] | None, Field(min_length=1, description="Patterns of weights; none: linear layers in the blocks.")
    ] = None
    whole: Annotated[
        list[str],
        Field(description="Patterns of other tensors (embeddings, norms) that are stored whole if they differ."),
    ] = []

    @property
    def in_float64(self) -> bool:
        """The decomposition."""
        return True

    @model_validator(mode="after")
    def _how_much(self) -> Settings:
        if self.rank is None and self.energy is None:
            raise ValueError("expected `rank`, `energy` or both: how much of the difference is kept")
        if self.slices:
            raise ValueError("expected no slices: an adapter has the layers of its base")
        if self.part or self.vocabulary:
            raise ValueError("expected no `part` and no `vocabulary`: an adapter has the tensors and rows of its base")
        return self


@dataclass(frozen=True)
class Found:
    """What one tensor of the two models came to."""

    squared: float
    """Squared norm of the difference."""
    pair: Pair | None = None
    values: Tensor | None = None


def make(job: Job, settings: Settings) -> dict[str, Any]:
    """Write the adapter's folder; the notes give rank and relative error of each layer, and what was left out."""
    from contextlib import ExitStack

    from graft.merge._write_lora import write_lora
    from graft.merge.inputs import inputs
    from graft.merge.preflight import layout
    from graft.merge.related import unrelated
    from graft.merge.stream import Workers

    plan, parts = layout(settings, job.models), inputs(settings, job.models)
    home = parts[settings.base].home
    linear = linear_layers(home, parts[settings.base].headers)
    with ExitStack() as opened:
        readers = {name: opened.enter_context(part.open()) for name, part in parts.items()}
        workers = opened.enter_context(Workers(device=job.device or "cpu"))
        forced = [*plan.forced, *unrelated(settings, plan, readers)]
        names = list(plan.tensors)
        each = workers.map(lambda n: _found(n, plan, settings, readers, linear, workers.device), names)
        found = dict(zip(names, each, strict=True))
    pairs = {linear[name].module: one.pair for name, one in found.items() if one.pair is not None}
    if not pairs:
        raise CannotCombine(f"{settings.names[0]} and {settings.base} do not differ in any layer that `on` names")
    write_lora(
        job.out, pairs, {name: one.values for name, one in found.items() if one.values is not None},
        base=str(home.resolve()), dtype=settings.dtype or "float32", turned=any(one.turned for one in linear.values()),
    )  # fmt: skip
    return {"notes": plan.notes | _notes(found, linear), "forced": forced}


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model: its path, and whether its weight is stored as [in, out]."""

    module: str
    turned: bool


def linear_layers(folder: Path, headers: Headers) -> dict[str, Linear]:
    """Weight's name among `headers` → layer. Raises CannotCombine where `transformers` does not know the model."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from graft.lora import stands_for
    from graft.merge.architecture import empty_model

    model = empty_model(folder)
    if model is None:
        raise CannotCombine(f"{folder}: this version of transformers does not know the model, nor what of it is linear")
    made = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and (name := stands_for(f"{path}.weight", headers)):
            made[name] = Linear(path, isinstance(module, Conv1D))
    return made


def _found(
    name: str,
    plan: Layout,
    settings: Settings,
    readers: Mapping[str, TensorReader],
    linear: Mapping[str, Linear],
    there: str,
) -> Found:
    from graft.merge._factors import factored
    from graft.merge.stream import Source

    place = plan.places[name]
    before, after = (Source(model, readers[model], place[model]) for model in (settings.base, settings.names[0]))
    squared = _squared_difference(before, after)
    if squared == 0:
        return Found(0.0)
    if name in linear and _wanted(name, settings.on):
        delta = after.read().sub_(before.read()).to(there)
        return Found(squared, factored(delta.T if linear[name].turned else delta, settings.rank, settings.energy))
    keep = any(fnmatchcase(name, pattern) for pattern in settings.whole)
    return Found(squared, values=after.read() if keep else None)


def _squared_difference(a: Source, b: Source) -> float:
    """Squared norm of the difference of two tensors, a piece at a time. Raises CheckpointError for NaN and Inf."""
    from graft.merge.stream import PIECE

    count, total = a.reader.headers[a.name].count, 0.0
    for start in range(0, count, PIECE):
        first, second = (source.read(start, min(PIECE, count - start)) for source in (a, b))
        total += float(first.sub_(second).double().square().sum())
    return total


def _wanted(name: str, patterns: list[str] | None) -> bool:
    if patterns is None:
        return LAYER.fullmatch(name) is not None
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _notes(found: Mapping[str, Found], linear: Mapping[str, Linear]) -> dict[str, Any]:
    """Ranks and relative errors by layer; the share of the whole squared difference that the adapter holds."""
    total = sum(one.squared for one in found.values())
    kept = sum(one.squared * (1 - one.pair.error**2) for one in found.values() if one.pair is not None)
    kept += sum(one.squared for one in found.values() if one.values is not None)
    pairs = {linear[name].module: one.pair for name, one in found.items() if one.pair is not None}
    out = sorted(n for n, one in found.items() if one.squared > 0 and one.pair is None and one.values is None)
    return {
        "ranks": {name: pair.rank for name, pair in pairs.items()},
        "relative_error": {name: round(pair.error, 6) for name, pair in pairs.items()},
        "share_kept": round(kept / total, 6),
        "left_out": out,
    }
