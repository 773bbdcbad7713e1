"""Averages of the checkpoints of one training run."""

import json
import shutil

import pytest
import torch
from small_family import tensors
from typer.testing import CliRunner

from graft.errors import RequestError, SettingsError
from graft.merge import VERB
from graft.merge.checkpoints import dev_losses, kept_checkpoints, shares

STEPS = {10: ("wild", 3.0), 20: ("down", 1.5), 30: ("jump", 1.2), 40: ("up", 1.4)}
"""step → (whose weights, dev loss)."""


@pytest.fixture
def run(trained, tmp_path):
    """The folder of a training that kept four checkpoints and a moving average."""
    folder = shutil.copytree(trained["up"], tmp_path / "run")
    for step, (name, _) in STEPS.items():
        shutil.copytree(trained[name], folder / "checkpoints" / f"step-{step}")
    shutil.copytree(trained["base"], folder / "checkpoints" / "ema")
    entries = [{"step": 1, "loss": 9.0}, *({"step": step, "dev_loss": loss} for step, (_, loss) in STEPS.items())]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.fixture
def averaged(merge, run):
    def make(name="out", **settings):
        return merge({"method": "checkpoints", "of": "run", **settings}, name, more={"run": run})

    return make


def mean(trained, weights):
    every = {name: tensors(trained[name]) for name in weights}
    whole = sum(weights.values())
    names = next(iter(every.values()))
    return {t: sum(w / whole * every[n][t].double() for n, w in weights.items()).float() for t in names}


CHOICES = [
    ({"last": 2}, {"jump": 1, "up": 1}),
    ({}, {"wild": 1, "down": 1, "jump": 1, "up": 1}),
    ({"best": 2}, {"jump": 1, "up": 1}),
    ({"best": 1}, {"jump": 1}),
    ({"last": 3, "ema": 0.5}, {"down": 0.25, "jump": 0.5, "up": 1}),
    ({"ema": "kept"}, {"base": 1}),
]


@pytest.mark.parametrize(("settings", "weights"), CHOICES, ids=lambda value: ",".join(value) or "all")
def test_an_average_of_checkpoints_is_the_mean_by_hand(settings, weights, averaged, trained):
    out, notes = averaged(**settings)
    made = tensors(out)
    for name, expected in mean(trained, weights).items():
        torch.testing.assert_close(made[name], expected, rtol=1e-6, atol=1e-7)
    assert sum(one["share"] for one in notes["checkpoints"]) == pytest.approx(1)
    assert all(one["hash"].startswith("xxh3:") for one in notes["checkpoints"])


def test_the_best_may_be_those_of_a_measure(averaged, trained, measured):
    out, notes = averaged(best=1, on="down.dev")
    assert [one["name"] for one in notes["checkpoints"]] == ["run/step-20"]
    made, expected = tensors(out), tensors(trained["down"])
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert measured(out, "down.dev") == measured(trained["down"], "down.dev")


def test_shares_of_a_moving_average_fall_with_age():
    assert shares(3, 0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert shares(4, 1.0) == [0.25] * 4


def test_checkpoints_and_losses_of_transformers_own_trainer_are_found(trained, tmp_path):
    for step in (500, 1000):
        shutil.copytree(trained["up"], tmp_path / f"checkpoint-{step}")
    history = [{"step": 500, "loss": 3.0}, {"step": 500, "eval_loss": 2.0}, {"step": 1000, "eval_loss": 1.9}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert list(kept_checkpoints(tmp_path)) == [500, 1000]
    assert dev_losses(tmp_path) == {500: 2.0, 1000: 1.9}


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"last": 5}, "kept 4 checkpoints, expected 5"), ({"best": 2}, "say by what they are judged")],
)
def test_what_a_training_did_not_keep_is_said(settings, words, averaged, run):
    (run / "log.jsonl").write_text("")
    with pytest.raises(RequestError, match=words):
        averaged(**settings)


def test_a_training_that_kept_nothing_is_told_how(merge):
    with pytest.raises(RequestError, match=r"keep: \{last: 4\}"):
        merge({"method": "checkpoints", "of": "up", "last": 2})
    with pytest.raises(RequestError, match=r"ema: 0\.999"):
        merge({"method": "checkpoints", "of": "up", "ema": "kept"}, "other")


@pytest.mark.parametrize("wrong", [{"last": 2, "best": 2}, {"ema": "kept", "last": 2}, {"ema": 1.5}, {"on": "all.dev"}])
def test_choices_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(SettingsError, match="expected"):
        VERB.parse({"method": "checkpoints", "of": "run", **wrong})


@pytest.mark.slow
def test_from_the_command_line_a_real_training_is_averaged(tmp_path, root, data):
    from graft.cli import app

    def graft(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.stdout

    graft(
        "pretrain", tmp_path / "run", "--data", root / "all.jsonl", "--size", "60k", "--budget", "12 steps",
        "--set", "tokenizer.size=300", "--evaluate-every", "3", "--set", "keep.last=3", "--length", "32",
        "--batch-size", "4",
    )  # fmt: skip
    out = tmp_path / "mean"
    told = graft("merge", out, tmp_path / "run", "--method", "checkpoints", "--last", "2", "--json")
    notes = json.loads(told)["notes"]["checkpoints"]
    assert [one["name"].rpartition("/")[2] for one in notes] == ["step-9", "step-12"]
    parts = [tensors(tmp_path / "run" / "checkpoints" / f"step-{step}") for step in (9, 12)]
    for name, value in tensors(out).items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-6, atol=1e-7)
