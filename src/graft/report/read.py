"""From a run's folder to what the report shows. Reads only; what cannot be read is named, never fatal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

from graft import verbs
from graft.errors import CheckpointError, GraftError, RequestError
from graft.evaluate.results import VERSION
from graft.lineage import MANIFEST, read_manifest
from graft.settings import references
from graft.yaml_lines import read_yaml

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One thing that was measured: a metric of a task on a data set. Models are compared within a column only."""

    measure: str
    task: str
    metric: str
    on: str
    unit: str
    higher_is_better: bool

    @property
    def place(self) -> str:
        """The task where it has a name of its own, else the data set."""
        return self.task if self.task not in ("", self.measure, self.on) else self.on or self.measure

    @property
    def title(self) -> str:
        """`code.test · bits per byte`."""
        return f"{self.place} · {self.metric_words}"

    @property
    def metric_words(self) -> str:
        """The metric as words."""
        return (self.metric or self.measure).replace("_", " ")

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is strictly the better score."""
        return a > b if self.higher_is_better else a < b

    def rank(self, value: float) -> float:
        """A number that is smaller for better scores."""
        return -value if self.higher_is_better else value


@dataclass(frozen=True)
class Model:
    """One node of the family: its manifest where it has been made, `{}` where not."""

    name: str
    verb: str
    parents: tuple[str, ...]
    manifest: Row = field(default_factory=dict)
    log: tuple[Row, ...] = ()
    folder: Path | None = None
    place: str = ""
    """Of a finished model that was only measured: where it lies, in words."""

    @property
    def made(self) -> bool:
        """Whether the node's folder is complete."""
        return bool(self.manifest)

    @property
    def combines(self) -> bool:
        """Whether it was made from several models, so that it has to be better than the best of them."""
        return len(self.parents) > 1

    @property
    def measured_from(self) -> str | None:
        """The parent that the others are measured from, by its settings."""
        base = (self.manifest.get("settings") or {}).get("base")
        return str(base) if base in self.parents else None

    @property
    def combined(self) -> list[str]:
        """Its parents without those that the others are only measured from, or stand on."""
        stood_on = (self.manifest.get("settings") or {}).get("adapters_of")
        return [parent for parent in self.parents if parent not in (self.measured_from, stood_on)]

    @property
    def kind(self) -> str:
        """Verb and method: `merge linear`; of a finished model without a manifest where it lies."""
        if self.place and not self.made:
            return self.place
        settings = self.manifest.get("settings") or {}
        named = next((settings[key] for key in ("method", "combine", "bits") if key in settings), None)
        method = next(iter(named), None) if isinstance(named, Mapping) else named
        method = f"{method} bits" if isinstance(method, int) else method
        return f"{self.verb} {method}" if isinstance(method, str) else self.verb

    def weight_of(self, parent: str) -> float | None:
        """The weight that a combination gives one of its parents: as fitted, else as its settings say.

        The sum over its members, where a parent stands for several (checkpoints, passes with dropout).
        """
        fitted = (self.manifest.get("metrics") or {}).get("weights")
        given = (self.manifest.get("settings") or {}).get("models")
        for weights in (fitted, given):
            own = [w for name, w in weights.items() if self._stands_for(parent, name)] if _is_table(weights) else []
            if own and all(map(is_number, own)):
                return float(sum(own))
        return None

    def _stands_for(self, parent: str, member: str) -> bool:
        """Whether a member of this name is the parent, or one of several that come from it."""
        several = MEMBERS.fullmatch(member.removeprefix(parent)) if member.startswith(parent) else None
        return member == parent or (several is not None and member not in self.parents)


@dataclass(frozen=True)
class Run:
    """A run's folder as the report sees it. `problems` says in sentences what is missing, stale or unreadable."""

    folder: Path
    family: str
    models: dict[str, Model]
    columns: list[Column]
    scores: dict[tuple[str, Column], Row]
    comparisons: list[tuple[Column, Row]]
    problems: list[str]
    asked: Mapping[str, Any] = field(default_factory=dict)
    """What the recipe says under `report:`."""

    def row(self, model: str, column: Column) -> Row | None:
        """The score of `model` in `column`, or None."""
        return self.scores.get((model, column))

    def ranked(self, column: Column) -> list[Row]:
        """The scores of a column, best first."""
        return sorted((r for (_, c), r in self.scores.items() if c == column), key=lambda r: column.rank(r["value"]))

    @cached_property
    def costs(self) -> dict[str, dict[str, float]]:
        """By model: median tokens/s over its measurements, largest peak memory, bytes on disk."""
        reduce: dict[str, Callable[[list[float]], float]] = {
            "tokens_per_s": median,
            "peak_memory_bytes": max,
            "disk_bytes": max,
        }
        found: dict[str, dict[str, list[float]]] = {}
        for (model, _), row in self.scores.items():
            for name, value in (row.get("cost") or {}).items():
                if name in reduce and is_number(value) and value > 0:
                    found.setdefault(model, {}).setdefault(name, []).append(value)
        return {m: {name: float(reduce[name](values)) for name, values in c.items()} for m, c in found.items()}


MEMBERS = re.compile(r"(-step-\d+|-ema)?(\.\d+)?")
"""What the names of members have behind that of the model which they come from."""


def _is_table(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number (and not a truth value)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises RequestError where it is no folder or holds neither models nor results."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise RequestError(
            f"expected the folder of a run, found {found} at {folder}: give the folder `graft run` wrote"
        )
    known = ["models", "results.jsonl", "recipe.yaml"]
    if not any((folder / name).exists() for name in known):
        raise RequestError(f"{folder} is not the folder of a run: it holds none of {', '.join(known)}")
    problems: list[str] = []
    recipe = _recipe(folder / "recipe.yaml", problems)
    rows = list(read_lines(folder / "results.jsonl", problems))
    models = _models(folder, recipe, problems)
    if not (folder / "models").exists():
        newest = {str(row["model"]): row for row in rows if row.get("kind") == "score" and row.get("model")}
        models |= {name: _finished(name, newest) for name in newest if name not in models}
    scores = _scores(rows, models, problems)
    columns = list(dict.fromkeys(column for _, column in scores))
    family = str(recipe.get("family") or folder.resolve().name)
    asked = recipe.get("report")
    compared = _comparisons(rows, models, scores)
    return Run(folder, family, models, columns, scores, compared, problems, asked if isinstance(asked, dict) else {})


def _finished(name: str, newest: Mapping[str, Row]) -> Model:
    """A model that no run made, but that was measured where it lies: with its manifest, if that is still its own.

    Its parents are those of its parents that were measured too, as they were when it was made.
    """
    row = newest[name]
    folder = Path(str(row["folder"])) if row.get("folder") else None
    place = f"the folder {folder}" if folder else "a finished model"
    try:
        manifest = read_manifest(folder) if folder else None
    except (CheckpointError, OSError):
        manifest = None
    if manifest is None or manifest.hash != row.get("model_hash"):
        return Model(name, "load", (), folder=folder, place=place)
    known = {str(other.get("model_hash")): model for model, other in newest.items()}
    parents = tuple(known[parent.hash] for parent in manifest.parents if parent.hash in known)
    return Model(name, manifest.verb, parents, manifest.plain(), folder=folder, place=place)


def read_lines(path: Path, problems: list[str]) -> Iterator[Row]:
    """The JSON objects of a file, one a line; none where there is no file. A torn line is named and left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                yield value
            elif line.strip():
                problems.append(f"{path.name} line {number} is not a JSON object and was left out")


def _recipe(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    document = read_yaml(path.read_text(encoding="utf-8", errors="replace"))
    if document.problems:
        problems.append(f"{path.name} cannot be read: {document.problems[0]}")
    return document.value if isinstance(document.value, dict) else {}


def _models(folder: Path, recipe: Mapping[str, Any], problems: list[str]) -> dict[str, Model]:
    """Nodes in the recipe's order, then those on disk that the recipe does not name, oldest first."""
    made = {m.name: m for m in _made(folder / "models", problems)}
    planned = recipe.get("models")
    planned = planned if isinstance(planned, dict) else {}
    ordered = {str(name): made.get(str(name)) or _planned(str(name), raw, planned) for name, raw in planned.items()}
    rest = _parents_first(
        sorted(
            (m for m in made.values() if m.name not in ordered),
            key=lambda m: (str(m.manifest.get("created", "")), m.name),
        )
    )
    missing = [name for name, model in ordered.items() if not model.made]
    if missing:
        problems.append(f"not made yet: {', '.join(missing)}")
    return {**ordered, **{m.name: m for m in rest}}


def _parents_first(models: list[Model]) -> list[Model]:
    ordered: dict[str, Model] = {}
    by_name = {m.name: m for m in models}

    def place(model: Model, above: tuple[str, ...]) -> None:
        for name in model.parents:
            if name in by_name and name not in above:
                place(by_name[name], (*above, name))
        ordered.setdefault(model.name, model)

    for model in models:
        place(model, (model.name,))
    return list(ordered.values())


def _made(folder: Path, problems: list[str]) -> Iterator[Model]:
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        try:
            manifest = read_manifest(path.parent)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        assert manifest is not None
        yield Model(
            name=manifest.name,
            verb=manifest.verb,
            parents=tuple(parent.name for parent in manifest.parents),
            manifest=manifest.plain(),
            log=tuple(read_lines(path.parent / "log.jsonl", problems)),
            folder=path.parent,
        )


def _planned(name: str, raw: Any, planned: Mapping[str, Any]) -> Model:
    """A node that is not made yet: its verb, and the models that its settings name as far as they parse."""
    named = next((key for key in raw if key != "seed"), "load") if isinstance(raw, dict) else "load"
    try:
        settings = verbs.verb(named).parse(raw[named])
        parents = [model for kind, model, _ in references(settings) if kind == "model" and model in planned]
    except (GraftError, ImportError, TypeError, KeyError):
        parents = []
    return Model(name, str(named), tuple(dict.fromkeys(parents)))


def _scores(rows: list[Row], models: Mapping[str, Model], problems: list[str]) -> dict[tuple[str, Column], Row]:
    """The newest row of each model and column, of the weights that the model has now."""
    found: dict[tuple[str, Column], Row] = {}
    stale: dict[str, None] = {}
    for row in rows:
        name = str(row.get("model"))
        if row.get("kind") != "score" or not is_number(row.get("value")):
            continue
        if name not in models or not _current(models[name], row.get("model_hash")):
            stale[name] = None
            continue
        place = name, _column(row)
        if place not in found or measured_by(row) >= measured_by(found[place]):
            found[place] = row
    if stale:
        problems.append(
            f"rows of models that have changed or gone since they were measured are left out: {', '.join(stale)}"
        )
    found = _of_one_version(found, problems)
    problems.extend(_unlike(found))
    return found


def measured_by(row: Row) -> int:
    """The version of the evaluation that took a score or compared two; 0 where the row is older than its being told."""
    told = row.get("evaluation")
    return told if isinstance(told, int) else 0


def _of_one_version(scores: Mapping[tuple[str, Column], Row], problems: list[str]) -> dict[tuple[str, Column], Row]:
    """Of each column the rows that its newest version of the evaluation took; what another one took is said."""
    newest: dict[Column, int] = {}
    for (_, column), row in scores.items():
        newest[column] = max(newest.get(column, 0), measured_by(row))
    older = [
        f"{model} ({column.title})" for (model, column), row in scores.items() if measured_by(row) < newest[column]
    ]
    if older:
        problems.append(
            "rows that an older version of the evaluation measured than others beside them are left out: "
            f"{', '.join(older)}; measure these models again"
        )
    if past := [column.title for column, version in newest.items() if version != VERSION]:
        problems.append(
            f"measured by another version of the evaluation, which may give other numbers now: {', '.join(past)}; "
            "measure again before you compare with other numbers"
        )
    return {place: row for place, row in scores.items() if measured_by(row) == newest[place[1]]}


def _current(model: Model, measured: Any) -> bool:
    now = model.manifest.get("hash")
    return now is None or measured is None or now == measured


def _unlike(scores: Mapping[tuple[str, Column], Row]) -> Iterator[str]:
    """Columns whose models were measured with different task versions or settings."""
    ways: dict[Column, set[str]] = {}
    for (_, column), row in scores.items():
        settings = row.get("settings")
        # of which other models it is taken as well changes nothing
        how = {key: value for key, value in settings.items() if key != "models"} if _is_table(settings) else settings
        ways.setdefault(column, set()).add(json.dumps([row.get("task_version"), how], sort_keys=True))
    for column, seen in ways.items():
        if len(seen) > 1:
            yield f"{column.title}: measured with {len(seen)} different task versions or settings; compare with care"


def _column(row: Row) -> Column:
    texts = {key: str(row.get(key) or "") for key in ("measure", "task", "metric", "on", "unit")}
    return Column(**texts, higher_is_better=bool(row.get("higher_is_better", False)))


def _comparisons(
    rows: list[Row], models: Mapping[str, Model], scores: Mapping[tuple[str, Column], Row]
) -> list[tuple[Column, Row]]:
    """The newest comparison of each pair in each column; the pair's weights must be those the models have now, and the
    version of the evaluation that of the column's scores."""
    by_key = {(c.measure, c.task, c.metric, c.on): c for _, c in scores}
    versions = {column: measured_by(row) for (_, column), row in scores.items()}
    keys = ("measure", "task", "metric", "on")
    found: dict[tuple[Column, str, str], Row] = {}
    for row in rows:
        pair = row.get("models")
        measure, task, metric, on = (str(row.get(key) or "") for key in keys)
        column = by_key.get((measure, task, metric, on))
        if row.get("kind") != "comparison" or column is None or not isinstance(pair, list) or len(pair) != 2:
            continue
        hashes = row.get("model_hashes") or [None, None]
        current = all(n in models and _current(models[n], h) for n, h in zip(pair, hashes, strict=False))
        if current and is_number(row.get("difference")) and measured_by(row) == versions[column]:
            first, second = sorted(pair)
            found[column, first, second] = row
    return [(column, row) for (column, _, _), row in found.items()]
