"""What a merge that looks at data may say of it: by what it is judged, what is searched, how random it is. Light."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, model_serializer, model_validator

from graft.errors import RequestError, SettingsError
from graft.settings import DataRef, Settings

if TYPE_CHECKING:
    from graft.evaluate import Measure
    from graft.merge.settings import MergeSettings

J = TypeVar("J", bound="Judged")


class Judged(Settings):
    """A measure, as in `evaluate:`, on held-out data."""

    on: Annotated[
        DataRef | list[DataRef] | None,
        Field(description="Held-out data with its split, such as `mixed.dev`; of several, the mean counts."),
    ] = None
    measure: Annotated[
        str | dict[str, Any],
        Field(description="A measure of `evaluate:`; with options `{classification: {metrics: [mcc]}}`."),
    ] = "bits_per_byte"
    task: Annotated[str | None, Field(description="A task's file instead of a measure.")] = None
    metric: Annotated[str | None, Field(description="Which metric counts; none: the measure's first.")] = None
    limit: Annotated[
        int,
        Field(
            gt=0,
            description="At most so many documents or items of each data set, drawn from all of it by their hashes.",
        ),
    ] = 200

    @model_validator(mode="after")
    def _is_a_measure(self) -> Judged:
        if self.task is not None and self.measure != "bits_per_byte":
            raise ValueError(f"expected `measure` or `task`, found both: {self.measure!r} and {self.task!r}")
        if isinstance(self.measure, dict) and len(self.measure) != 1:
            raise ValueError(f"expected one measure, found {', '.join(self.measure) or 'none'}")
        if self.judges:
            try:
                entry = self.entry()
            except SettingsError as error:
                raise ValueError("; ".join(problem.message for problem in error.problems)) from None
            if self.task is None:
                self.check_metric(getattr(entry, "metrics", [entry.measure]))  # type: ignore[attr-defined]
        return self

    def check_metric(self, known: Sequence[str]) -> None:
        """Raises ValueError where the metric that is to count is none of those that are computed."""
        if self.metric is not None and self.metric not in known:
            raise ValueError(f"expected a metric that is computed ({', '.join(known)}), found {self.metric!r}")

    @property
    def judges(self) -> bool:
        """Whether there is anything to judge by."""
        return bool(self.on) or self.task is not None

    @property
    def data(self) -> list[str]:
        """The data sets, with their splits."""
        return [self.on] if isinstance(self.on, str) else list(self.on or [])

    def entry(self) -> Measure:
        """The measure as `graft.evaluate` knows it. Raises SettingsError for one that it does not know."""
        from graft.evaluate import parse

        if self.task is not None:
            return parse([{"task": self.task, "limit": self.limit}])[0]
        name, options = (self.measure, {}) if isinstance(self.measure, str) else next(iter(self.measure.items()))
        return parse([{"measure": name, "on": self.data, "limit": self.limit, **(options or {})}])[0]


class NeedsData(Judged):
    """A measure that has to be there."""

    @model_validator(mode="after")
    def _has_data(self) -> NeedsData:
        if not self.judges:
            raise ValueError("expected held-out data to judge by (`on: mixed.dev`) or a `task`, found neither")
        return self


class Range(Settings):
    """Where a parameter is looked for, written `[lowest, highest]`, or `{values: [0.3, 0.5, 1]}` for these alone."""

    low: float = 0.0
    high: float = 1.0
    values: list[Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, list | tuple):
            if len(raw) != 2 or not all(isinstance(end, int | float) for end in raw):
                raise ValueError(f"expected [lowest, highest] or {{values: [...]}}, found {list(raw)!r}")
            return {"low": raw[0], "high": raw[1]}
        return raw

    @model_validator(mode="after")
    def _runs_upwards(self) -> Range:
        if self.values is None and not self.low < self.high:
            raise ValueError(f"expected [lowest, highest], found [{self.low:g}, {self.high:g}]")
        if self.values is not None and not self.values:
            raise ValueError("expected at least one value, found none")
        return self

    @model_serializer
    def _write(self) -> list[float] | dict[str, list[Any]]:
        return [self.low, self.high] if self.values is None else {"values": self.values}

    @property
    def ends(self) -> list[Any]:
        """What has to be possible: both ends, or all values."""
        return [self.low, self.high] if self.values is None else self.values


class Search(NeedsData):
    """Parameters of a merge that are tried and judged; the best stay."""

    over: Annotated[
        dict[str, Range],
        Field(
            min_length=1,
            description="Parameters of the method with where they are looked for: `{scale: [0.1, 1.5]}`; `weights` are "
            "those of all models, `density.coder` is that of one.",
        ),
    ]
    by: Annotated[
        Literal["grid", "golden", "cma_es"] | None,
        Field(
            description="`grid`; `golden` section, for one number; `cma_es`, an evolution strategy; none: `golden` for "
            "one number, else `cma_es`."
        ),
    ] = None
    evaluations: Annotated[
        int, Field(ge=1, description="Merges that are judged at most, beside the one as written.")
    ] = 20
    by_layer: Annotated[
        int | None,
        Field(
            ge=2, description="Each number becomes a gradient over the layers, of so many numbers; none: one for all."
        ),
    ] = None
    jobs: Annotated[int, Field(ge=1, description="Merges judged side by side, each in a process of its own.")] = 1

    @property
    def way(self) -> str:
        """How it is searched."""
        one = len(self.over) == 1 and "weights" not in self.over and self.by_layer is None
        return self.by or ("golden" if one else "cma_es")


class Seeds(Judged):
    """Merges with other seeds, to see how much hangs on chance; written `seeds: 5` where nothing is measured."""

    count: Annotated[int, Field(ge=2, description="Seeds: the node's own and those that follow it.")]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        return {"count": raw} if isinstance(raw, int) and not isinstance(raw, bool) else raw


class Barrier(NeedsData):
    """The measure along the straight line between each two of the models, and how high the hill on it is."""

    points: Annotated[int, Field(ge=3, description="Models measured on each line, its ends among them.")] = 5


def judged_parts(settings: MergeSettings) -> dict[str, Judged]:
    """What of a merge judges models, by its key; by the empty key what stands in the merge's own settings."""
    own = settings if isinstance(settings, Judged) else None
    parts: dict[str, Judged | None] = {"search": settings.search, "seeds": settings.seeds, "barrier": settings.barrier}
    parts[""] = own
    return {key: part for key, part in parts.items() if part is not None}


def located(judged: J, root: Path) -> J:
    """With the absolute path of its task. Raises RequestError where there is none, or where it reads unnamed data."""
    from graft.data import split_ref
    from graft.evaluate.tasks import load_task

    path = (root / str(judged.task)).resolve()
    found = load_task(path)
    task = found.settings
    try:
        judged.check_metric(found.metrics)
    except ValueError as error:
        raise RequestError(f"{path}: {error}") from None
    if isinstance(task.data, str):
        reads = f"{split_ref(task.data)[0]}.{task.split}"
        if reads not in judged.data:
            raise RequestError(f"{path} reads the data set {reads}: name it beside the task, `on: {reads}`")
    return judged.model_copy(update={"task": str(path)})


def task_content(path: Path) -> list[str | None]:
    """What a task is made of: hashes of its file and, where it brings data of its own, of that."""
    from graft.evaluate.tasks import load_task, own_data
    from graft.hashing import hash_file

    own = own_data(load_task(path).settings, path)
    return [hash_file(path), None if own is None else own.fingerprint]
