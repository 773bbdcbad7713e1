"""Every recipe that is shipped can be read, and runs from end to end when it is made small."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from graft.data import files
from graft.recipe import read_recipe
from graft.yaml_lines import read_yaml

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
PATHS = ("path", "train", "dev", "test")
FEW = {"limit": 3, "evaluations": 3, "rows": 3, "epochs": 1, "steps": 2, "tokens": 256}


def shrunk(recipe: Path, folder: Path) -> dict[str, Any]:
    """The recipe with the same tree, on the first lines of its data (put into `folder`), tiny models, a few steps."""
    raw = read_yaml(recipe.read_text()).value
    for name, source in raw["data"].items():
        _fewer_documents(source, recipe.parent, folder / name)
    for node in raw["models"].values():
        settings = next(value for key, value in node.items() if key != "seed")
        if "budget" in settings:
            settings |= {"budget": "4 steps", "batch_size": 2, "evaluate_every": 1 if "keep" in settings else 4}
        if "pretrain" in node:
            settings |= {"size": "60k", "length": 64}
            if "of" not in settings.get("tokenizer", {}):
                settings["tokenizer"] = {"size": 300}
        for part in (settings, settings.get("search", {}), settings.get("weights", {})):
            part |= {key: value for key, value in FEW.items() if key in part}
        if "fit" in settings.get("weights", {}):
            settings["weights"]["documents"] = 3
    for measure in raw["evaluate"]:
        measure["limit"] = 3
    return raw


def _fewer_documents(source: dict[str, Any], root: Path, folder: Path) -> None:
    for key in PATHS:
        if isinstance(source.get(key), str):
            source[key] = str(excerpt(root / source[key], folder.with_name(f"{folder.name}-{key}.jsonl")))
            source["splits"] = {"dev": 0.2}
    if source.get("source") == "python-library":
        source |= {"packages": ["json", "wsgiref", "zoneinfo"], "splits": {"dev": 0.2, "test": 0.2}}


def excerpt(file: Path, target: Path, records: int = 40, characters: int = 300) -> Path:
    """The first records of a file of JSON lines, their texts cut short."""
    with target.open("w") as out:
        for _, line in itertools.islice(files.lines(file), records):
            short = {k: v[:characters] if isinstance(v, str) else v[:6] for k, v in json.loads(line).items()}
            out.write(json.dumps(short) + "\n")
    return target


def missing_data(recipe: Path) -> list[str]:
    """The files of a recipe that are not on this machine."""
    sources = read_yaml(recipe.read_text()).value["data"].values()
    named = [source[key] for source in sources for key in PATHS if isinstance(source.get(key), str)]
    return [path for path in named if not (recipe.parent / path).exists()]


@pytest.fixture(params=RECIPES, ids=lambda recipe: recipe.stem)
def recipe(request) -> Path:
    """Each recipe whose data is there."""
    absent = missing_data(request.param)
    if absent:
        pytest.skip(f"{absent[0]} is not there")
    return request.param


def test_a_shipped_recipe_can_be_read_and_compares_combinations_with_members(recipe):
    found = read_recipe(recipe)
    assert found.evaluate
    assert any(len(node.models) > 1 for node in found.models.values())


@pytest.mark.slow
def test_a_shipped_recipe_runs_from_end_to_end(recipe, tmp_path):
    from graft import report
    from graft.run import run

    small = tmp_path / recipe.name
    small.write_text(yaml.safe_dump(shrunk(recipe, tmp_path), sort_keys=False))
    result = run(small, tmp_path / "run")
    found = report.summary(result.folder)
    assert result.made == list(read_recipe(recipe).models)
    assert all(model["scores"] for model in found["models"])
    assert found["problems"] == []
    assert result.report.read_text().count("<svg") > 3
    json.dumps(found)
