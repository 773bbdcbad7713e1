"""The Python face of graft: `graft.run`, `graft.merge`, … each does what the command of its name does."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft import tree as trees
from graft.adapters.facts import adapted_base
from graft.chatting import Talk
from graft.disk import atomic_write
from graft.errors import RequestError, SettingsError
from graft.evaluate.settings import Measure, TaskMeasure
from graft.evaluate.tasks import load_task
from graft.facts import facts_of
from graft.models import check_asked, check_device, load
from graft.one import data_at, data_named, in_place, make_one
from graft.plan import Places, Plan, make_plan
from graft.recipe import read_recipe
from graft.recipe.measures import check_models
from graft.recipe.problems import Problems
from graft.run import RunResult, locked, run

if TYPE_CHECKING:
    from graft.adapters.listened import Listened
    from graft.advise import Advice as TuningAdvice
    from graft.data import DataSettings
    from graft.deltas import Advice, Deltas, Outcome
    from graft.ensemble.gains import Gains
    from graft.ensemble.show import Spoken
    from graft.relate import Relation
    from graft.tree import Member

__all__ = [
    "RunResult",
    "adapt",
    "advise",
    "chat",
    "deltas",
    "ensemble",
    "evaluate",
    "explain",
    "gains",
    "head",
    "load",
    "merge",
    "plan",
    "pretrain",
    "quantize",
    "relate",
    "report",
    "run",
    "show",
    "tree",
    "tune",
]


def plan(
    recipe: Path | str,
    out: Path | str | None = None,
    *,
    only: Collection[str] = (),
    force: Collection[str] = (),
    verify: bool = False,
) -> Plan:
    """What `run` would do: every node with its key, whether it is there, and what it will cost."""
    family = read_recipe(recipe)
    places = Places(Path(out) if out is not None else Path("runs") / family.family)
    return make_plan(family, places, only=only, force=force, verify=verify)


def advise(
    model: Path | str,
    data: Path | str,
    *,
    fit: str | None = None,
    share: float | None = None,
    many: bool = False,
    budget: str = "1 epochs",
    data_sets: Mapping[str, Any] | None = None,
    root: Path | str = ".",
    write: Path | str | None = None,
) -> TuningAdvice:
    """Which way of tuning `model` on `data` to try first, on what evidence, and a recipe that checks it.

    `data` is a file, or names one of `data_sets` (settings as in a recipe, with paths from `root`). `fit`: memory, such
    as `24GB`; `share`: percent of the parameters that may be trained; `many`: adapters for many tasks on one base;
    `budget`: how long each is trained. `write`: where the recipe goes. Raises RequestError where nothing fits.
    """
    from graft.plan.fit import memory_limit

    room = importlib.import_module("graft.advise")
    if not (Path(model) / "config.json").is_file():
        raise RequestError(f"{model}: expected a model's folder (with config.json), found none")
    check_asked([Path(model)])
    if share is not None and not 0 < share <= 100:
        raise RequestError(f"expected a `share` (--share) above 0 and up to 100 percent, found {share:g}")
    known = dict(data_sets or {})
    asked = in_place(data if isinstance(data, Mapping) else str(data), within=True)
    own = {} if asked in known else data_at(asked, known)
    called = Path(str(own["path"] if asked.startswith("{") and isinstance(own.get("path"), str) else data)).stem
    name = asked if asked in known else re.sub(r"[^A-Za-z0-9_-]", "-", called).strip("-")
    sets = known if asked in known else {name: own}
    limit = memory_limit(fit) if fit is not None else None
    found = room.advise(Path(model), sets, name, Path(root), limit=limit, share=share, many=many, budget=budget)
    if write is not None:
        atomic_write(Path(write), found.yaml())
    return found


def tree(place: Path | str) -> dict[str, Member]:
    """The family of a recipe, of a run's folder, or of one model with its ancestors, by name."""
    return trees.family_of(place)


def relate(
    a: Path | str,
    b: Path | str,
    *,
    seed: int = 0,
    adapters_of: Path | str | None = None,
    allow_pickle: bool = False,
) -> Relation:
    """How the models in two folders are related, and what may therefore be combined; reads a sample of the weights.

    `adapters_of`: the model that adapters in the form of peft stand on, where they do not name it rightly;
    `allow_pickle` as in a merge.
    """
    room = importlib.import_module("graft.relate")
    return room.relate(a, b, seed=seed, adapters_of=adapters_of, allow_pickle=allow_pickle)


def report(folder: Path | str) -> Path:
    """Write `report.html` into a run's folder and return its path."""
    return importlib.import_module("graft.report").write_report(folder)


def pretrain(out: Path | str, **settings: Any) -> Path:
    """Train a model from scratch in the folder `out`. Settings are those of `pretrain:` in a recipe."""
    return _make("pretrain", out, settings)


def tune(out: Path | str, **settings: Any) -> Path:
    """Tune a model into the folder `out`. Settings are those of `tune:` in a recipe; `from_` is the model."""
    return _make("tune", out, settings)


def adapt(out: Path | str, **settings: Any) -> Path:
    """Put adapters together in the folder `out`. Settings are those of `adapt:` in a recipe."""
    return _make("adapt", out, settings)


def head(out: Path | str, **settings: Any) -> Path:
    """Split a task's head out of a model, into the folder `out`. Settings are those of `head:` in a recipe."""
    return _make("head", out, settings)


def merge(out: Path | str, **settings: Any) -> Path:
    """Average models' weights into the folder `out`. Settings are those of `merge:` in a recipe."""
    return _make("merge", out, settings)


def ensemble(out: Path | str, **settings: Any) -> Path:
    """Average models' predictions: an ensemble in the folder `out`. Settings are those of `ensemble:` in a recipe."""
    return _make("ensemble", out, settings)


def quantize(out: Path | str, **settings: Any) -> Path:
    """Pack a model's linear layers, or unpack them, into the folder `out`. Settings are those of `quantize:`."""
    return _make("quantize", out, settings)


_CONDUCT = ("data_sets", "seed", "root", "force", "wait", "launch", "device", "hub")


def _make(verb: str, out: Path | str, settings: dict[str, Any]) -> Path:
    """The names in `_CONDUCT` say how; all else are settings of the verb."""
    conduct = {name: settings.pop(name) for name in _CONDUCT if name in settings}
    conduct["data"] = conduct.pop("data_sets", {})
    return make_one(verb, out, {name.removesuffix("_"): _plain(v) for name, v in settings.items()}, **conduct)


def _plain(value: Any) -> Any:
    """Paths as text, in lists and mappings too."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def evaluate(
    models: Sequence[Path | str] | Mapping[str, Path | str],
    measures: Sequence[Mapping[str, Any]],
    *,
    data_sets: Mapping[str, Any] | None = None,
    out: Path | str = "runs/eval",
    root: Path | str = ".",
    seed: int = 0,
    wait: bool = True,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Measure models (folders) side by side and return the rows; what was measured before is not measured again.

    `measures` are those of `evaluate:` in a recipe. Data sets are names of `data_sets` (settings as in a recipe) or
    files, of which all is measured where no split is named. The rows are also in `out/results.jsonl`. `wait`: wait for
    another run, or measuring, in `out` rather than refuse (Locked).
    """
    from graft.settings import references

    check_device(device)
    room = importlib.import_module("graft.evaluate")
    folders = _named(models)
    if not measures:
        raise RequestError("expected at least one measure, such as {'measure': 'bits_per_byte', 'on': ['d.jsonl']}")
    parsed = room.parse([in_place(measure) for measure in measures], ("evaluate",))
    asked = {ref for m in parsed for kind, ref, _ in references(m) if kind == "data"}
    sets = _sets(asked, data_sets)
    check_asked(folders.values())
    places = Places(Path(out))
    with locked(places, wait=wait, trains=False):
        _check_measures(parsed, folders, Path(root))
        return room.evaluate(
            folders,
            parsed,
            data=sets,
            root=Path(root),
            out=places.folder,
            seed=seed,
            device=device,
        )


def _check_measures(measures: Sequence[Measure], folders: Mapping[str, Path], root: Path) -> None:
    """Raises SettingsError for measures that cannot be taken of these models, before any is."""
    # of a folder that tells nothing, what is wrong is said when it is measured
    told = {name: Problems().attempt((), lambda: facts_of(folder)) for name, folder in folders.items()}  # noqa: B023
    known = {name: facts for name, facts in told.items() if facts is not None and facts.architecture != "unknown"}
    tasks = {n: load_task(root / m.task) for n, m in enumerate(measures) if isinstance(m, TaskMeasure)}
    problems = Problems()
    check_models(dict(enumerate(measures)), tasks, known, problems)
    if problems.found:
        raise SettingsError(problems.found)


def _sets(asked: Collection[str], data_sets: Mapping[str, Any] | None) -> dict[str, DataSettings]:
    """All data sets, those in files that are `asked` for as well."""
    from graft.data import parse

    return {name: parse(raw, ("data", name)) for name, raw in data_named(asked, data_sets or {}).items()}


def _named(models: Sequence[Path | str] | Mapping[str, Path | str]) -> dict[str, Path]:
    """Folders of models by name: that of the folder, where none is given; the path, where several folders have one
    name. Raises RequestError for a model that stands there twice."""
    if isinstance(models, Mapping):
        return {name: Path(folder) for name, folder in models.items()}
    short = [Path(model).resolve().name for model in models]
    unique = [name if short.count(name) == 1 else str(model) for name, model in zip(short, models, strict=True)]
    if len(set(unique)) < len(unique):
        raise RequestError(f"expected each model once, found {', '.join(unique)}")
    return {name: Path(model) for name, model in zip(unique, models, strict=True)}


def gains(
    models: Sequence[Path | str] | Mapping[str, Path | str],
    on: str,
    *,
    documents: int = 200,
    data_sets: Mapping[str, Any] | None = None,
    root: Path | str = ".",
    seed: int = 0,
    device: str | None = None,
) -> Gains:
    """What mixtures of models would gain on held-out text, and who should join in which order, before any is made.

    `on` names one of `data_sets` (settings as in a recipe) with its split, or is a file, of which all is read where no
    split is named.
    """
    on = in_place(on, within=True)
    sets = _sets([on], data_sets)
    room, folders = importlib.import_module("graft.ensemble.candidates"), _named(models)
    check_device(device)
    check_asked(folders.values())
    return room.predicted(folders, sets, on, root=Path(root), documents=documents, seed=seed, device=device)


def deltas(
    base: Path | str,
    models: Sequence[Path | str] | Mapping[str, Path | str],
    *,
    on: str | None = None,
    measure: str = "bits_per_byte",
    limit: int = 100,
    points: int = 5,
    merge: Mapping[str, Any] | str | None = None,
    data_sets: Mapping[str, Any] | None = None,
    root: Path | str = ".",
    page: Path | str | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
) -> tuple[Deltas, Advice, Outcome | None]:
    """What models learned away from their base, what to try first, and (with `on`) how they, their mean and their
    ensemble do on held-out data and along the lines between them. `page` writes the pictures as HTML there.

    `merge`: a method, or settings with a method among them, measured on `on` beside the mean. `allow_pickle` as in a
    merge. Raises RequestError for a merge without `on`.
    """
    from graft.merge.inputs import readable

    check_device(device)
    if merge is not None and on is None:
        raise RequestError("expected held-out data to measure the merge on (`on`, --on), found none")
    room, named = importlib.import_module("graft.deltas"), _named(models)
    check_asked([Path(base), *named.values()], loads=on is not None)
    written = {"method": merge} if isinstance(merge, str) else merge
    seen = None
    with readable([Path(base), *named.values()], allow_pickle) as (below, *places):
        folders = dict(zip(named, places, strict=True))
        wanted = None if written is None else room.merge_of(folders, below, written)
        found = replace(room.deltas(below, folders), base=str(base))
        if on is not None:
            judge = importlib.import_module("graft.evaluate.judge").Judge
            on = in_place(on, within=True)
            measures = [{"measure": measure, "on": [on], "limit": limit}]
            (asked,) = importlib.import_module("graft.evaluate").parse(measures)
            judged = judge.of(asked, _sets([on], data_sets), Path(root))
            more = {"merge": wanted, "sets": data_sets, "root": Path(root)}
            seen = room.outcome(folders, judged, base=below, points=points, device=device, **more)
    advice = room.advise(found)
    if page is not None:
        atomic_write(Path(page), importlib.import_module("graft.deltas.page").page(found, advice, seen))
    return found, advice, seen


def explain(
    models: Sequence[Path | str],
    *,
    base: Path | str | None = None,
    adapters_of: Path | str | None = None,
    allow_pickle: bool = False,
) -> Advice:
    """Which merge of these models to try first, and why, from their weights alone.

    `base` None: the one model that all of them were made from, where their manifests, or the adapters, name one.
    `adapters_of` and `allow_pickle` as in a merge.
    """
    given = [Path(place) if place else None for place in (base, adapters_of)]
    check_asked([*map(Path, models), *(place for place in given if place is not None)], loads=False)
    return importlib.import_module("graft.deltas").explain([Path(m) for m in models], *given, allow_pickle)


def show(
    model: Path | str, text: str, *, page: Path | str | None = None, device: str | None = None
) -> Spoken | Listened:
    """Which member of a mixture or product speaks at which token of `text`, or which adapter a fusion listens to, at
    every place; with `page` also as an HTML page there."""
    check_device(device)
    check_asked([Path(model)])
    fused = adapted_base(Path(model)) is not None
    room = importlib.import_module("graft.adapters.listened" if fused else "graft.ensemble.show")
    spoken: Spoken | Listened = (room.listens if fused else room.speaks)(model, text, device=device)
    if page is not None:
        atomic_write(Path(page), room.page(spoken))
    return spoken


def chat(model: Path | str, prompt: str, **settings: Any) -> str:
    """The model's whole answer to `prompt`. `system`, `device`, `hub` and the settings of `Talk.reply` may be given."""
    own = {name: settings.pop(name) for name in ("system", "device", "hub") if name in settings}
    return "".join(Talk(model, **own).reply(prompt, **settings))
