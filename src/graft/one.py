"""One node without a recipe: the same checks, key, lock, resume and manifest as in a run."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from graft import verbs
from graft._load import LoadSettings, fetched
from graft.data import nearest_ref, split_ref
from graft.data.files import COMPRESSED, SUFFIXES, begins_as_text
from graft.errors import DataError, RequestError
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
    `data` (settings as in a recipe), or files. A model that was made otherwise is replaced only with `force`. Raises
    RequestError for what is wrong with the request and RunError for what goes wrong while it runs.
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
    if used := [ref for ref, folder in recipe.outside.items() if folder.resolve() == target.resolve()]:
        raise RequestError(f"{target} is {used[0]}, which it is to be made from: choose another folder")
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
    return "path" in settings and not file.endswith((".yaml", ".yml"))


def data_at(place: str, names: Collection[str] = ()) -> dict[str, Any]:
    """Settings of the data set in a file or folder: by its suffix, or what a YAML file says. Raises DataError.

    `names`: data sets that might have been meant.
    """
    path = Path(place).expanduser()
    if not place or not path.exists():
        meant = f"{nearest_ref(place, names)}; data sets are: {', '.join(names)}" if names else ""
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
