"""Adapters added up to one adapter, which never becomes a full model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graft.errors import CannotCombine
from graft.merge.settings import NormalisedSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from graft.lora import Lora
    from graft.merge._factors import Pair
    from graft.verb import Job


class Settings(NormalisedSettings):
    """`sum_m w_m s_m B_m A_m` as one adapter: exact where neither `rank` nor `energy` is given, its rank being the sum
    of the ranks; else the best of that rank."""

    method: Literal["add_adapters"] = "add_adapters"
    makes: ClassVar[Literal["model", "adapter"]] = "adapter"
    of_one_base: ClassVar[bool] = True
    normalise: Annotated[bool, Field(description="Divide the weights by their sum.")] = False
    rank: Annotated[int | None, Field(ge=1, description="Largest rank of the result; none: all, which is exact.")] = (
        None
    )
    energy: Annotated[
        float | None, Field(gt=0, le=1, description="Keep as many columns as hold this share of the squared norm.")
    ] = None

    @model_validator(mode="after")
    def _as_a_whole(self) -> Settings:
        if self.slices or self.varied:
            raise ValueError("expected whole adapters with one weight each, found slices or weights that vary")
        if self.part or self.vocabulary:
            raise ValueError("expected no `part` and no `vocabulary`: adapters are added up as they are")
        return self


def make(job: Job, settings: Settings) -> dict[str, Any]:
    """Write the adapter's folder; the notes give ranks and, where columns were dropped, the error of each tensor."""
    from graft.lineage import facts_of
    from graft.lora import base_folder, is_lora, read_lora
    from graft.merge._write_lora import write_lora
    from graft.merge.preflight import anyway, problems

    if models := [name for name in settings.names if not is_lora(job.models[name])]:
        raise CannotCombine(f"{models[0]} is a model: `extract_lora` makes an adapter of its difference to a base")
    never, forced = problems(settings, {name: facts_of(folder) for name, folder in job.models.items()})
    if refused := [*never, *anyway(settings, forced)]:
        raise CannotCombine("\n".join(refused))
    parts = {name: read_lora(job.models[name]) for name in settings.names}
    first = parts[settings.names[0]]
    home = job.models[settings.adapters_of] if settings.adapters_of else base_folder(first.folder)
    named = str(home.resolve()) if home is not None else str(first.config.get("base_model_name_or_path"))
    pairs = sums(parts, settings.factors, settings.rank, settings.energy)
    whole = _whole(parts, settings.factors, home)
    write_lora(
        job.out, pairs, whole, base=named, dtype=settings.dtype or "float32", embeddings=_embeddings(parts),
        turned=bool(first.config.get("fan_in_fan_out")), architecture=_task(first),
    )  # fmt: skip
    lost = {name: round(pair.error, 6) for name, pair in pairs.items() if pair.error > 0}
    truncated = settings.rank is not None or settings.energy is not None
    notes: dict[str, Any] = {"exact": not truncated, "ranks": {name: p.rank for name, p in sorted(pairs.items())}}
    if truncated:
        notes["relative_error"] = lost
    if whole:
        notes["whole_tensors"] = sorted(whole)
    return {"notes": notes, "forced": forced}


def sums(parts: Mapping[str, Lora], weights: list[float], rank: int | None, energy: float | None) -> dict[str, Pair]:
    """Module → factors of the weighted sum.

    Raises CannotCombine where adapters change a module in other shapes, and CheckpointError, naming adapter and tensor,
    for NaN and Inf.
    """
    from graft.merge._factors import concatenated, refactored

    modules = {name.removesuffix(".weight"): None for part in parts.values() for name in part.changes}
    made = {}
    for module in sorted(modules):
        own = {
            name: (part, weight)
            for (name, part), weight in zip(parts.items(), weights, strict=True)
            if f"{module}.weight" in part.changes
        }
        found = [_pair(name, part, module, weight) for name, (part, weight) in own.items()]
        shapes = {(pair.b.shape[0], pair.a.shape[1]) for pair in found}
        if len(shapes) > 1:
            raise CannotCombine(f"{', '.join(own)} change {module} in different shapes: they stand on different models")
        pair = concatenated(found)
        cut = rank is not None or energy is not None or pair.rank > min(next(iter(shapes)))
        made[module] = refactored(pair, rank, energy) if cut else pair
    return made


def _pair(name: str, part: Lora, module: str, weight: float) -> Pair:
    from graft.checkpoint import TensorReader
    from graft.merge._factors import Pair
    from graft.merge.stream import Source

    factors = part.changes[f"{module}.weight"]
    with TensorReader(part.folder) as reader:
        a, b = (Source(name, reader, factor).read() for factor in (factors.a, factors.b))
    return Pair(a, b.mul_(factors.scale * weight))


def _embeddings(parts: Mapping[str, Lora]) -> frozenset[str]:
    return frozenset(
        name.removesuffix(".weight")
        for part in parts.values()
        for name, factors in part.changes.items()
        if "lora_embedding" in factors.a
    )


def _task(part: Lora) -> str:
    return {"SEQ_2_SEQ_LM": "encoder-decoder", "CAUSAL_LM": "decoder"}.get(str(part.config.get("task_type")), "encoder")


def _whole(parts: Mapping[str, Lora], weights: list[float], home: Any) -> dict[str, Tensor]:
    """Tensors that adapters hold whole: the base's, and the weighted sum of their differences from it."""
    # what an adapter both holds and changes is a copy of the base's tensor
    names = sorted({name for part in parts.values() for name in part.whole if name not in part.changes})
    if not names:
        return {}
    if both := [name for name in names for part in parts.values() if name in part.changes]:
        raise CannotCombine(
            f"{both[0]} is held whole by one adapter and changed by factors in another: fold one of them"
        )
    if home is None:
        raise CannotCombine(
            f"{names[0]} is held whole: its change is only known beside the base, which is not on this machine; say "
            "which it is, as `adapters_of`"
        )
    from graft.checkpoint import TensorReader
    from graft.lora import stands_for
    from graft.merge.stream import Source

    made = {}
    with TensorReader(home) as base:
        for name in names:
            there = stands_for(name, base.headers)
            if there is None:
                raise CannotCombine(f"{home}: expected {name}, which the adapters hold whole, found none")
            start = Source(str(home), base, there).read()
            made[name] = start.clone()
            for (adapter, part), weight in zip(parts.items(), weights, strict=True):
                if name in part.whole:
                    with TensorReader(part.folder) as reader:
                        own = Source(adapter, reader, part.whole[name]).read()
                    made[name].add_(own.sub_(start), alpha=weight)
    return made
