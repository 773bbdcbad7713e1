"""Trackers that are installed hold the losses of the log, in files on this machine, and leave stdout to the answer."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from graft.train.trackers import Title
from graft.verb import Job

WORDS = [
    "pretrain", "models/base", "--data", "d.jsonl", "--hidden", "32", "--layers", "1", "--length", "16", "--batch-size",
    "4", "--budget", "3 steps", "--tokenizer.size", "300", "--json",
]  # fmt: skip


def trained(folder, tracker, **environment):
    """Train a little model that a tracker is told of, in a process of its own; (what it printed, losses of the log)."""
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    (folder / "d.jsonl").write_text("".join(f'{{"text": "the rain falls on hill {n}"}}\n' for n in range(60)))
    words = [sys.executable, "-m", "graft", *WORDS, "--track", f"[{tracker}]"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW", "TRACKIO"))}
    done = subprocess.run(words, cwd=folder, env=plain | environment, capture_output=True, text=True, timeout=300)
    log = folder / "models" / "base" / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done, [entry["loss"] for entry in entries if "loss" in entry]


def rows(file, query):
    with sqlite3.connect(file) as opened:
        return opened.execute(query).fetchall()


def test_weights_and_biases_offline_holds_the_losses(tmp_path):
    done, losses = trained(tmp_path, "wandb", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "base"
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert len(losses) == 3
    assert all(repr(loss).encode() in content for loss in losses)
    assert tmp_path.name.encode() in content


def test_weights_and_biases_without_an_account_says_how_to_do_without(tmp_path):
    done, _ = trained(tmp_path, "wandb", WANDB_MODE="online", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert done.returncode != 0
    assert "to keep all on this machine set WANDB_MODE=offline" in json.loads(done.stdout)["error"]


def test_mlflow_holds_the_losses(tmp_path):
    file = tmp_path / "kept" / "mlflow.db"
    file.parent.mkdir()
    done, losses = trained(tmp_path, "mlflow", MLFLOW_TRACKING_URI=f"sqlite:///{file}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "base"
    found = rows(file, "select step, value from metrics where key = 'loss' order by step")
    assert found == list(enumerate(losses, 1))
    assert rows(file, "select name, status from runs") == [("base", "FINISHED")]
    assert (tmp_path.name,) in rows(file, "select name from experiments")
    assert rows(file, "select value from params where key = 'budget'") == [("3 steps",)]


def test_trackio_holds_the_losses(tmp_path):
    done, losses = trained(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "kept"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "base"
    (file,) = (tmp_path / "kept").glob("*.db")
    found = rows(file, "select run_name, step, metrics from metrics order by id")
    told = [(name, step, json.loads(values)) for name, step, values in found]
    assert [(name, step, values["loss"]) for name, step, values in told if "loss" in values] == [
        ("base", step, loss) for step, loss in enumerate(losses, 1)
    ]


@pytest.mark.parametrize(
    ("target", "project"), [("runs/quickstart/models/base", "quickstart"), ("mine/base", "mine"), (None, "work")]
)
def test_a_run_is_named_for_its_node_and_the_project_for_the_family(tmp_path, target, project):
    out = tmp_path / "work" / "out"
    job = Job("base", None, 0, out, out, out, {}, {}, target=None if target is None else Path(target))  # type: ignore[arg-type]
    assert Title.of(job) == Title(project, "base")
