"""Adapters added up to one adapter, which never becomes a full model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graft.adapters.facts import TOGETHER
from graft.errors import CannotCombine
from graft.lora import Factors, Shift
from graft.merge.settings import NormalisedSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from graft.checkpoint import TensorReader
    from graft.lora import Lora
    from graft.merge._factors import Pair
    from graft.verb import Facts, Job


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
    from graft.facts import facts_of
    from graft.merge._write_lora import write_lora
    from graft.merge.inputs import changes_in, is_adapter
    from graft.merge.preflight import anyway, problems

    facts = {name: facts_of(folder) for name, folder in job.models.items()}
    never, forced = problems(settings, facts)
    if models := [name for name in settings.names if facts[name].mergeable and not is_adapter(job.models[name])]:
        raise CannotCombine(f"{models[0]} is a model: `extract_lora` makes an adapter of its difference to a base")
    homes = {} if never else {name: _home(job, settings, name) for name in settings.names}
    forced = list(dict.fromkeys([*forced, *_other_bases(homes)]))
    if refused := [*never, *anyway(settings, forced)]:
        raise CannotCombine("\n".join(refused))
    parts = {name: changes_in(job.models[name], homes[name] or Path()) for name in settings.names}
    first, home = parts[settings.names[0]], homes[settings.names[0]]
    named = str(home.resolve()) if home is not None else str(first.config.get("base_model_name_or_path"))
    pairs = sums(parts, settings.factors, settings.rank, settings.energy)
    if not pairs:
        raise CannotCombine(f"{', '.join(parts)} change no linear layers: {TOGETHER}")
    whole = _whole(parts, settings.factors, home)
    write_lora(
        job.out, pairs, whole, base=named, dtype=settings.dtype or "float32", embeddings=_embeddings(parts),
        turned=any(_turned(part) for part in parts.values()), architecture=_task(first, facts[settings.names[0]]),
    )  # fmt: skip
    lost = {name: round(pair.error, 6) for name, pair in pairs.items() if pair.error > 0}
    truncated = settings.rank is not None or settings.energy is not None
    notes: dict[str, Any] = {"exact": not truncated, "ranks": {name: p.rank for name, p in sorted(pairs.items())}}
    if truncated:
        notes["relative_error"] = lost
    if whole:
        notes["whole_tensors"] = sorted(whole)
    return {"notes": notes, "forced": forced}


def _other_bases(homes: Mapping[str, Path | None]) -> Iterator[str]:
    """Adapters that stand on other weights than the first does, a sentence each."""
    from graft.lineage import known_hash
    from graft.merge.preflight import OTHER_BASES

    (first, home), *others = homes.items() if homes else [("", None)]
    for name, own in others:
        if (
            home
            and own
            and own.resolve() != home.resolve()
            and known_hash(home, own_hash := known_hash(own)) != own_hash
        ):
            yield f"{name} and {first} {OTHER_BASES}"


def _home(job: Job, settings: Settings, name: str) -> Path | None:
    """The model that an adapter stands on; None where one of peft's names none that is on this machine."""
    from graft.lora import base_folder, is_lora
    from graft.merge.inputs import home_of

    given, folder = job.models[settings.adapters_of] if settings.adapters_of else None, job.models[name]
    lost = given is None and is_lora(folder) and base_folder(folder) is None
    return None if lost else home_of(name, folder, given)


def sums(parts: Mapping[str, Lora], weights: list[float], rank: int | None, energy: float | None) -> dict[str, Pair]:
    """Module → factors of the weighted sum.

    Raises CannotCombine where adapters change a module in other shapes, and CheckpointError, naming adapter and tensor,
    for NaN and Inf.
    """
    from graft.merge._factors import concatenated, refactored

    modules = {name.removesuffix(".weight") for part in parts.values() for name in part.changes if _product(part, name)}
    made = {}
    for module in sorted(modules):
        own = {
            name: (part, weight)
            for (name, part), weight in zip(parts.items(), weights, strict=True)
            if _product(part, f"{module}.weight")
        }
        found = [_pair(name, part, module, weight) for name, (part, weight) in own.items()]
        shapes = {(pair.b.shape[0], pair.a.shape[1]) for pair in found}
        if len(shapes) > 1:
            raise CannotCombine(f"{', '.join(own)} change {module} in different shapes: they stand on different models")
        pair = concatenated(found)
        cut = rank is not None or energy is not None or pair.rank > min(next(iter(shapes)))
        made[module] = refactored(pair, rank, energy) if cut else pair
    return made


def _product(part: Lora, name: str) -> list[Factors]:
    """The factors by which an adapter changes a tensor. Raises CannotCombine where it multiplies the tensor."""
    changes = part.changes.get(name, ())
    if not all(isinstance(change, Factors | Shift) for change in changes):
        raise CannotCombine(
            f"{part.folder}: the adapter multiplies {name}, which is no sum of factors: {{adapt: {{adapters: [...]}}}} "
            "lets adapters run one after the other, and any other method makes a model of them"
        )
    return [change for change in changes if isinstance(change, Factors)]


def _pair(name: str, part: Lora, module: str, weight: float) -> Pair:
    from graft.lora import LoraReader
    from graft.merge._factors import Pair, concatenated
    from graft.merge.stream import Source

    found = []
    with LoraReader(part) as reader:
        for factors in _product(part, f"{module}.weight"):
            a, b = (Source(name, reader, factor).read() for factor in (factors.a, factors.b))
            found.append(Pair(a, b.mul_(factors.scale * weight)))
    return concatenated(found)


def _embeddings(parts: Mapping[str, Lora]) -> frozenset[str]:
    return frozenset(
        name.removesuffix(".weight")
        for part in parts.values()
        for name in part.changes
        if any("lora_embedding" in factors.a for factors in _product(part, name))
    )


def _turned(part: Lora) -> bool:
    """Whether weights of linear layers are stored as [in, out]."""
    each = (factors for name in part.changes for factors in _product(part, name))
    return any(factors.transposed and "lora_embedding" not in factors.a for factors in each)


def _task(part: Lora, facts: Facts) -> str:
    if facts.architecture != "unknown":
        return facts.architecture
    return {"SEQ_2_SEQ_LM": "encoder-decoder", "CAUSAL_LM": "decoder"}.get(str(part.config.get("task_type")), "encoder")


def _whole(parts: Mapping[str, Lora], weights: list[float], home: Path | None) -> dict[str, Tensor]:
    """Tensors that adapters hold whole or shift: the base's, and the weighted sum of their differences from it."""
    shifted = {name for part in parts.values() for name, found in part.changes.items() if isinstance(found[0], Shift)}
    # what an adapter both holds and changes is a copy of the base's tensor
    names = sorted(shifted | {name for part in parts.values() for name in part.whole if name not in part.changes})
    if not names:
        return {}
    if both := [name for name in names for part in parts.values() if _product(part, name)]:
        raise CannotCombine(
            f"{both[0]} is held whole by one adapter and changed by factors in another: fold one of them"
        )
    if home is None:
        raise CannotCombine(
            f"{names[0]} is held whole: its change is only known beside the base, which is not on this machine; say "
            "which it is, as `adapters_of`"
        )
    from graft.checkpoint import TensorReader

    with TensorReader(home) as base:
        return {name: _changed(name, parts, weights, base) for name in names}


def _changed(name: str, parts: Mapping[str, Lora], weights: list[float], base: TensorReader) -> Tensor:
    """The base's tensor and the weighted sum of what the adapters make of it beside."""
    from graft.lora import LoraReader, stands_for
    from graft.merge.stream import Source

    there = stands_for(name, base.headers)
    if there is None:
        raise CannotCombine(f"{base.folder}: expected {name}, which the adapters hold whole, found none")
    start = Source(str(base.folder), base, there).read()
    made = start.clone()
    for (adapter, part), weight in zip(parts.items(), weights, strict=True):
        with LoraReader(part) as reader:
            if name in part.whole:
                made.add_(Source(adapter, reader, part.whole[name]).read().sub_(start), alpha=weight)
            for change in part.changes.get(name, ()):
                if isinstance(change, Shift):
                    made.add_(Source(adapter, reader, change.own).read(), alpha=weight * change.scale)
    return made
