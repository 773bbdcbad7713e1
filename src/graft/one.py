"""One node without a recipe: the same checks, key, lock, resume and manifest as in a run."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from graft import verbs
from graft._load import LoadSettings, fetched
from graft.data import SPLITS, nearest_ref, split_ref
from graft.data.files import COMPRESSED, SUFFIXES, begins_as_text
from graft.errors import DataError, RequestError, nearest
from graft.folders import folders_behind
from graft.lineage import read_manifest
from graft.models import check_device, nearest_folder
from graft.plan import make_plan
from graft.plan.places import beside
from graft.recipe import Recipe, build_recipe
from graft.run import execute, executor_for, locked
from graft.settings import references
from graft.train.settings import TrainSettings
from graft.yaml_lines import Document, read_text, read_yaml

SOURCES = {ending: source for source, endings in SUFFIXES.items() for ending in endings}
"""The source of a data file, by its suffix."""


def make_one(
    verb: str,
    out: Path | str,
    settings: Mapping[str, Any] | str,
    *,
    data: Mapping[str, Any] | None = None,
    seed: int = 0,
    root: Path | str = ".",
    force: bool = False,
    wait: bool = True,
    launch: str | None = None,
    device: str | None = None,
    hub: bool = False,
) -> Path:
    """Make one model in the folder `out` and return it; nothing is done where it is there already.

    Models in `settings` are folders, or with `hub`, which allows the network, ids on the hub; data sets are names of
    `data` (settings as in a recipe), files, or settings in place of a name. A model that was made otherwise is
    replaced only with `force`. Raises RequestError for what is wrong with the request and RunError for what goes wrong
    while it runs.
    """
    check_device(device)
    executor = executor_for(launch=launch)
    target = Path(out)
    if not str(out):
        raise RequestError("expected a folder to write, found an empty name")
    if target.exists() and not target.is_dir():
        raise RequestError(f"expected a folder to write, found the file {target}: choose another name")
    places = beside(target)
    begin = None if target.exists() else places.cache
    # a folder may be called what no node may: `llama-3.1-merge`
    called = re.sub(r"[^A-Za-z0-9_-]", "-", target.absolute().name).lstrip("-_") or verb
    recipe = one_node(verb, called, settings, data=data or {}, seed=seed, root=Path(root), hub=hub, begin=begin)
    _check_free(target, recipe.outside)
    (name,) = recipe.models
    with locked(places, wait=wait, trains=verbs.verb(verb).together):
        plan = make_plan(recipe, places, force=[name] if force else [])
        if target.exists() and plan.steps[name].state == "run" and not (target / "graft.json").is_file():
            raise RequestError(f"{target} is there already and was not made by graft: choose another folder")
        if target.exists() and plan.steps[name].state == "run" and not force:
            raise RequestError(
                f"{target} holds a model that was made otherwise (other settings, data or parents): choose another "
                "folder, or say `force=True` (--force) to replace it"
            )
        execute(plan, executor, device=device)
    return target


def _check_free(target: Path, parents: Mapping[str, Path]) -> None:
    """Raises RequestError where what will be written would take the place of what a parent is loaded from."""
    place = target.resolve()
    for ref, folder in parents.items():
        if folder.resolve() == place:
            raise RequestError(f"{target} is {ref}, which it is to be made from: choose another folder")
        if place in folders_behind(folder):
            raise RequestError(
                f"{target} holds weights that {ref} is loaded from and would lose: choose another folder"
            )


def told(folder: Path) -> list[str]:
    """What people should read of how a model came about, a line each."""
    manifest = read_manifest(folder)
    return verbs.told(manifest) if manifest is not None else []


def one_node(
    verb: str,
    name: str,
    settings: Mapping[str, Any] | str,
    *,
    data: Mapping[str, Any],
    seed: int,
    root: Path,
    hub: bool = False,
    begin: Path | None = None,
) -> Recipe:
    """A recipe of one node; the folders it names are models that stand outside of it.

    A node whose `name` is how one of those models is written has the verb in its name as well.
    `begin`: it will be made now, with this folder for its cache.
    """
    settings = verbs.verb(verb).alone(in_place(settings), root)
    parsed = verbs.verb(verb).parse(settings, ())
    named = list(dict.fromkeys((kind, ref) for kind, ref, _ in references(parsed)))
    folders = {ref: Path(ref).expanduser() for kind, ref in named if kind == "model"}
    missing = [ref for ref, folder in folders.items() if not folder.is_dir()]
    if missing and not hub:
        told = ", ".join(f"{ref}{nearest_folder(folders[ref])}" for ref in missing)
        raise RequestError(
            f"expected a model's folder, found none at {told}; a model on the hub needs the network allowed: "
            "`hub=True` (--hub)"
        )
    folders |= {ref: fetched(LoadSettings(path=ref, hub=True)) for ref in missing}
    while name in folders:
        name = f"{name}-{verb}"
    if begin is not None:
        verbs.verb(verb).begin(parsed, folders, begin)
    # a training has a dev split of its data; whatever else reads a file is to read all of it
    sets = data_named([ref for kind, ref in named if kind == "data"], data, whole=not isinstance(parsed, TrainSettings))
    value = {"family": name, "seed": seed, "data": sets, "models": {name: {verb: settings}}}
    return build_recipe(Document(value), root.resolve(), outside=folders)


def data_named(asked: Collection[str], sets: Mapping[str, Any], *, whole: bool = True) -> dict[str, Any]:
    """Settings of all data sets: the `sets` that are known, and of the files among what is `asked` for.

    `whole`: a file of which no split is asked for by name is not split by hash: all of it is read. Raises DataError for
    what is neither a data set nor a file.
    """
    files = {split_ref(ref)[0] for ref in asked} - set(sets)
    parted = {split_ref(ref)[0] for ref in asked if split_ref(ref)[0] != ref}
    found = {file: data_at(file, sets) for file in sorted(files)}
    unsplit = [file for file in found if whole and file not in parted and _is_ours_to_split(file, found[file])]
    return {**sets, **found, **{file: {**found[file], "splits": {"dev": 0, "test": 0}} for file in unsplit}}


def _is_ours_to_split(file: str, settings: Mapping[str, Any]) -> bool:
    """Whether nobody but this command has said how what is read of `file` is split."""
    return "path" in settings and "splits" not in settings and not file.endswith((".yaml", ".yml"))


_NAMED_BY = ("data", "on", "fit")
"""Settings that name data sets, wherever they stand."""


def in_place(settings: Any, within: bool = False) -> Any:
    """Settings, with data sets that are written where others are named (`data: {path: a.jsonl, limit: 10}`) named by
    what is written: `{"path": "a.jsonl", "limit": 10}`, and the split that `split:` says behind it.

    `within`: they stand inside of a setting that names data sets. Raises DataError for text that is no mapping.
    """
    if isinstance(settings, Mapping):
        if within and {"path", "source", "mix", "split", *SPLITS} & settings.keys():
            return _reference(settings)
        return {key: in_place(value, within or key in _NAMED_BY) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [in_place(value, within) for value in settings]
    return _reference(_mapping(settings)) if within and _is_in_place(settings) else settings


def _is_in_place(reference: Any) -> bool:
    return isinstance(reference, str) and reference.startswith("{") and split_ref(reference)[0] == reference


def _mapping(text: str) -> dict[str, Any]:
    document = read_yaml(text)
    if document.problems or not isinstance(document.value, dict):
        why = document.problems[0] if document.problems else "no mapping"
        raise DataError(f"expected a data set's settings, such as {{path: a.jsonl, limit: 10}}, found {text} ({why})")
    return document.value


def _reference(said: Mapping[str, Any]) -> str:
    split = said.get("split")
    if "split" in said and split not in SPLITS:
        raise DataError(f"expected a `split` of {', '.join(SPLITS)}, found {split!r} in {json.dumps(dict(said))}")
    whole = json.dumps({key: value for key, value in said.items() if key != "split"}, ensure_ascii=False)
    return f"{whole}.{split}" if split else whole


def _settings_of(text: str) -> dict[str, Any]:
    """Settings of a data set that is written in place; its paths are seen from here, and tell their source."""
    said = _mapping(text)
    if isinstance(path := said.get("path"), str) and "source" not in said and Path(path).expanduser().exists():
        return {**data_at(path), **{key: value for key, value in said.items() if key != "path"}}
    given = {key: said[key] for key in ("path", *SPLITS) if isinstance(said.get(key), str | list)}
    paths = {key: [files] if isinstance(files, str) else list(map(str, files)) for key, files in given.items()}
    if "source" not in said and "mix" not in said and paths:
        each = [path for files in paths.values() for path in files]
        found = {SOURCES[suffix] for path in each for suffix in Path(path).suffixes if suffix in SOURCES}
        if len(found) != 1:
            raise DataError(f"{', '.join(each)}: expected files of one known kind, or `source` beside them, in {text}")
        said["source"] = found.pop()
    return {**said, **{key: [str(Path(p).expanduser().absolute()) for p in files] for key, files in paths.items()}}


def data_at(place: str, names: Collection[str] = ()) -> dict[str, Any]:
    """Settings of the data set in a file or folder: by its suffix, or what a YAML file says; or those that are written
    in its place, `{path: a.jsonl, limit: 10}`. Raises DataError.

    `names`: data sets that might have been meant.
    """
    if _is_in_place(place):
        return _settings_of(place)
    path = Path(place).expanduser()
    if not place or not path.exists():
        beside = sorted(each.name for each in path.parent.iterdir()) if place and path.parent.is_dir() else []
        meant = (
            f"{nearest_ref(place, names)}; data sets are: {', '.join(names)}" if names else nearest(path.name, beside)
        )
        raise DataError(
            f"expected a data file, a folder or the name of a data set, found nothing at {place or repr(place)}{meant}"
        )
    if path.suffix in (".yaml", ".yml"):
        return yaml_file(path)
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        return {"source": "huggingface", "name": str(path.resolve())}
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = {SOURCES[s] for p in inside for s in p.suffixes if s in SOURCES}
    if not found and path.is_file() and begins_as_text(path):
        return {"source": "text", "path": str(path.resolve())}
    if len(found) != 1:
        kinds = f"{', '.join(SOURCES)} (most of them with {' or '.join(COMPRESSED)} behind it too)"
        there = f"files for {' and '.join(sorted(found))}" if found else "none"
        raise DataError(f"{place}: expected files of one kind, ending in one of {kinds}, found {there}")
    return {"source": found.pop(), "path": str(path.resolve())}


def yaml_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RequestError with the first thing that is wrong."""
    document = read_yaml(read_text(path, "a YAML file"))
    if document.problems or not isinstance(document.value, dict):
        raise DataError(f"{path}: {document.problems[0] if document.problems else 'expected a mapping'}")
    return document.value
