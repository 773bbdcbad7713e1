"""The mean of checkpoints of one training run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from graft.errors import RequestError
from graft.merge.judged import Judged
from graft.merge.prepared import ChoosingSettings, Prepared, as_written
from graft.settings import ModelRef

if TYPE_CHECKING:
    from graft.verb import Job


class Settings(ChoosingSettings, Judged):
    """The mean of the last or the best checkpoints that a training kept, or their moving average."""

    method: Literal["checkpoints"] = "checkpoints"
    of: Annotated[ModelRef, Field(description="The model whose training kept checkpoints (`keep: {last: 4}`).")]
    models: Annotated[
        list[ModelRef], Field(max_length=0, description="None: `of` says whose checkpoints are averaged.")
    ] = []
    last: Annotated[int | None, Field(ge=1, description="The newest so many.")] = None
    best: Annotated[
        int | None,
        Field(ge=1, description="So many with the lowest dev loss of the training, or the best by `on` and `measure`."),
    ] = None
    ema: Annotated[
        Literal["kept"] | float | None,
        Field(
            description="Each checkpoint counts so many times what the next newer one does; `kept`: the moving average "
            "that the training itself kept."
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _the_one_model(cls, raw: Any) -> Any:
        """A command gives its model as `models`."""
        models = raw.get("models") if isinstance(raw, Mapping) else None
        if isinstance(models, list) and len(models) == 1 and "of" not in raw:
            return {**{key: value for key, value in raw.items() if key != "models"}, "of": models[0]}
        return raw

    @model_validator(mode="after")
    def _one_choice(self) -> Settings:
        if self.ema == "kept" and (self.last or self.best):
            raise ValueError("expected `ema: kept` alone, or `last` or `best`, found both")
        if self.last and self.best:
            raise ValueError("expected `last` or `best`, found both")
        if isinstance(self.ema, float) and not 0 < self.ema < 1:
            raise ValueError(f"expected a decay between 0 and 1, found {self.ema:g}")
        if self.judges and not self.best:
            raise ValueError("expected `best` where checkpoints are judged, found none")
        return self

    @property
    def names(self) -> list[str]:
        """The one model."""
        return [self.of]


def prepare(job: Job, settings: Settings) -> Prepared:
    """Finds the checkpoints; what is merged is their linear soup. Raises RequestError where there are too few."""
    from graft.hashing import hash_weights
    from graft.merge.linear import Settings as Linear

    run = job.models[settings.of]
    if settings.ema == "kept":
        chosen = [_moving_average(run)]
        folders = {f"{settings.of}/ema": chosen[0]}
    else:
        kept = kept_checkpoints(run)
        steps = _chosen(job, settings, kept)
        folders = {f"{settings.of}/step-{step}": kept[step] for step in steps}
    decay = settings.ema if isinstance(settings.ema, float) else 1.0
    weights = dict(zip(folders, shares(len(folders), decay), strict=True))
    merged = Linear(models=weights, **as_written(settings))
    told = [{"name": n, "share": weights[n], "hash": hash_weights(folder)} for n, folder in folders.items()]
    return Prepared(merged, {"checkpoints": told}, models=folders)


def shares(count: int, decay: float) -> list[float]:
    """Shares of checkpoints from the oldest to the newest, in sum 1: each is `decay` times that of the next newer."""
    raw = [decay ** (count - 1 - place) for place in range(count)]
    return [share / sum(raw) for share in raw]


def kept_checkpoints(run: Path) -> dict[int, Path]:
    """Step → folder of the checkpoints that a training kept: `checkpoints/step-N`, or `checkpoint-N` of transformers.

    Raises RequestError where there are none.
    """
    found = {}
    for place, kind in ((run / "checkpoints", "step-"), (run, "checkpoint-")):
        for folder in place.glob(f"{kind}*"):
            number = folder.name.removeprefix(kind)
            if number.isdigit() and (folder / "config.json").is_file():
                found[int(number)] = folder
    if not found:
        raise RequestError(
            f"{run}: expected checkpoints on the way, found none; train it with `keep: {{last: 4}}` or `{{best: 4}}`"
        )
    return dict(sorted(found.items()))


def _moving_average(run: Path) -> Path:
    folder = run / "checkpoints" / "ema"
    if not (folder / "config.json").is_file():
        raise RequestError(
            f"{run}: expected the moving average of its training, found none; train it with `ema: 0.999`"
        )
    return folder


def _chosen(job: Job, settings: Settings, kept: Mapping[int, Path]) -> list[int]:
    """The steps of the checkpoints that are averaged, the oldest first. Raises RequestError where there are too few."""
    wanted = settings.best or settings.last or len(kept)
    if wanted > len(kept):
        raise RequestError(f"{settings.of} kept {len(kept)} checkpoints, expected {wanted} at least; ask for fewer")
    if not settings.best:
        return list(kept)[-wanted:]
    losses = _judged(job, settings, kept) if settings.judges else dev_losses(job.models[settings.of])
    if missing := [step for step in kept if step not in losses]:
        raise RequestError(
            f"{settings.of}: expected a dev loss of every checkpoint, found none of steps {missing}; say by what they "
            "are judged (`on: mixed.dev`)"
        )
    return sorted(sorted(kept, key=lambda step: losses[step])[:wanted])


def dev_losses(run: Path) -> dict[int, float]:
    """Dev loss by step, from the log of the training (`log.jsonl`, or `trainer_state.json` of transformers)."""
    own, theirs = run / "log.jsonl", run / "trainer_state.json"
    if own.is_file():
        entries: Sequence[Mapping[str, Any]] = [json.loads(line) for line in own.read_text().splitlines()]
    else:
        entries = json.loads(theirs.read_text()).get("log_history", []) if theirs.is_file() else []
    return {
        int(entry["step"]): float(entry[key]) for entry in entries for key in ("dev_loss", "eval_loss") if key in entry
    }


def _judged(job: Job, settings: Settings, kept: Mapping[int, Path]) -> dict[int, float]:
    """The loss of every checkpoint by the measure that is asked for."""
    from dataclasses import replace

    from graft.evaluate.unseen import check_unseen
    from graft.merge.candidates import Candidates
    from graft.merge.uniform_soup import Settings as Mean

    check_unseen(job.models, settings.data, job.data, job.root)
    names = {step: f"{settings.of}/step-{step}" for step in kept}
    each = [Mean(models=[name], **as_written(settings)) for name in names.values()]
    folders = {names[step]: folder for step, folder in kept.items()}
    whole = Mean(models=list(folders), **as_written(settings))
    with Candidates(replace(job, settings=whole, models=folders), settings) as candidates:
        return dict(zip(kept, candidates.losses(each), strict=True))
