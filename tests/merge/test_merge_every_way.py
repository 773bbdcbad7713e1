"""Every method by its name: a command, Python and a node of a recipe give the same bytes."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import graft
from graft.cli import app
from graft.merge import VERB

TUNED = ["up", "down", "jump"]
READ = {"on": "all.jsonl", "tokens": 400, "length": 16}
OWN = {
    "slerp": {"models": ["up", "down"]},
    "nuslerp": {"models": ["up", "down"]},
    "nearswap": {"models": ["up"], "t": 0.01},
    "arcee_fusion": {"models": ["up"]},
    "passthrough": {"models": ["up"]},
    "extract_lora": {"models": ["up"], "rank": 2},
    "add_adapters": {"models": ["thin", "thinner"]},
    "checkpoints": {"of": "trained", "last": 2},
    "rebasin": {"models": ["up", "down"], "on": "all.jsonl"},
    "greedy_soup": {"models": TUNED, "on": "all.jsonl"},
    "learned_soup": {"models": TUNED, "on": "all.jsonl", "rows": 8, "epochs": 1, "length": 16},
    "adamerging": {"models": TUNED, "steps": 2, **READ},
    "localize_and_stitch": {"models": TUNED, "steps": 2, **READ},
} | {name: {"models": TUNED, **READ} for name in ("fisher", "regmean", "regmean_plus")}
"""What a method is given beside its defaults, where that is not three models."""


def settings(name):
    own = {"method": name} | OWN.get(name, {"models": TUNED})
    based = VERB.types()[name].model_fields.get("base")
    return own | ({"base": "base"} if based is not None and based.is_required() else {})


def recipe(names):
    """Each method a node of its name, over the finished models, and one that keeps checkpoints."""
    there = {name: {"load": f"./{name}"} for name in ("base", *TUNED, "thin", "thinner")}
    kept = {"data": "all", "method": "full", "batch_size": 2, "evaluate_every": 1, "keep": {"last": 2}}
    there["trained"] = {"tune": {"from": "base", "budget": "3 steps", **kept}}
    made = {name: settings(name) for name in names}
    asked = {name: one | ({"on": "all.train"} if "on" in one else {}) for name, one in made.items()}
    data = {"all": {"source": "jsonl", "train": "all.jsonl", "dev": "dev.jsonl", "splits": {"test": 0}}}
    models = there | {f"by_{name}": {"merge": one, "seed": 3} for name, one in asked.items()}
    return {"family": "every", "data": data, "models": models}


def words(name):
    """Each method as a command."""
    given = settings(name)
    options = [w for key, value in given.items() if key != "models" for w in (f"--{key.replace('_', '-')}", str(value))]
    return ["merge", f"command/{name}", *given.get("models", []), *options, "--seed", "3"]


@pytest.mark.slow
def test_every_method_is_the_same_by_command_in_python_and_in_a_recipe(trained, data, root, tmp_path, monkeypatch):
    for name, folder in trained.items():
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "all.jsonl").symlink_to(root / "all.jsonl")
    (tmp_path / "dev.jsonl").write_text('{"text": "abdcegfh"}\n')
    monkeypatch.chdir(tmp_path)
    for name, model in (("thin", "up"), ("thinner", "down")):
        graft.merge(name, method="extract_lora", base="base", models=[model], rank=2)
    names = list(VERB.types())
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(names), sort_keys=False))
    done = graft.run("r.yaml", "run").folder / "models"
    (tmp_path / "trained").symlink_to((done / "trained").resolve())
    for name in names:
        told = CliRunner().invoke(app, words(name))
        assert told.exit_code == 0, f"{name}: {told.output} {told.stderr}"
        python = graft.merge(f"python/{name}", seed=3, **settings(name))
        first, *others = (weights(folder) for folder in (done / f"by_{name}", tmp_path / "command" / name, python))
        for other in others:
            assert first.keys() == other.keys()
            assert all(torch.equal(first[tensor], other[tensor]) for tensor in first), name


def weights(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
