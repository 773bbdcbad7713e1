"""Killed at any moment, a training ends with the bytes of one that never was."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import tiny
import torch
from tiny import Stops

from graft.errors import DiskError
from graft.train import loop
from graft.train import state as state_module
from graft.train.state import WRITTEN_A_SECOND, pause, read_state, write_state

GIVEN = {
    "budget": "40 steps",
    "accumulate": 2,
    "ema": 0.9,
    "evaluate_every": 7,
    "keep": {"last": 2, "best": 2},
    "checkpoint_every": "1 step",
}


def without_clock(folder):
    return [{k: v for k, v in entry.items() if k not in ("seconds", "tokens_per_s")} for entry in tiny.log(folder)]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


TRAIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tiny
tiny.train_into(sys.argv[2], json.loads(sys.argv[3]), 0.1)
"""


def test_sigkill_at_random_moments_changes_no_byte(tmp_path, beside):
    """With dropout, and with a state written behind every step, so that many kills fall into the writing."""

    def start(name):
        return beside.start(TRAIN, Path(tiny.__file__).parent, tmp_path / name, json.dumps(GIVEN))

    beside.run("")  # the server is there before the clock runs
    clock = random.Random(0)
    began = time.monotonic()
    whole = start("whole")
    assert whole.wait() == 0, whole.stderr
    length = time.monotonic() - began
    kills = 0
    while not (tmp_path / "killed" / "weights").exists():
        process = start("killed")
        if kills < 6 and process.kill_after(clock.uniform(0.2, 0.6) * length):
            kills += 1
        else:
            assert process.wait() == 0, process.stderr
            if kills == 0:
                # a busy machine was slower before: sooner, then
                shutil.rmtree(tmp_path / "killed")
                length /= 2
    assert (tmp_path / "killed" / "weights").read_bytes() == (tmp_path / "whole" / "weights").read_bytes()
    assert files(tmp_path / "killed" / "out") == files(tmp_path / "whole" / "out")
    assert without_clock(tmp_path / "killed") == without_clock(tmp_path / "whole")


class StopsAt(tiny.ByteLoss):
    """Raises in call `stop`, as a kill would."""

    def __init__(self, stop):
        self.left = stop

    def __call__(self, model, batch):
        self.left -= 1
        if self.left == 0:
            raise Stops
        return super().__call__(model, batch)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("stop", [1, 2, 5, 6])
@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "partial"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, stop, damage):
    given = {"checkpoint_every": "1 step", "precision": "fp32"}
    with pytest.raises(Stops):
        tiny.run(tmp_path / "a", given, model=tiny.tiny_model(0.1), objective=StopsAt(stop))
    states = sorted((tmp_path / "a" / "scratch").glob("state-*"))
    if states and damage != "none":
        content = bytearray(states[-1].read_bytes())
        if damage == "partial":
            (tmp_path / "a" / "scratch" / "state.partial").write_bytes(content[:100])
        else:
            content[-9] ^= 1
            states[-1].write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    _, resumed = tiny.run(tmp_path / "a", given, model=tiny.tiny_model(0.1))
    _, whole = tiny.run(tmp_path / "b", given, model=tiny.tiny_model(0.1))
    assert torch.equal(parameters(resumed), parameters(whole))
    assert without_clock(tmp_path / "a") == without_clock(tmp_path / "b")


def test_going_on_reads_only_the_rows_that_are_left(tmp_path):
    with pytest.raises(Stops):
        tiny.run(tmp_path, {"checkpoint_every": "1 step"}, objective=StopsAt(5))
    counts = StopsAt(-1)
    tiny.run(tmp_path, {"checkpoint_every": "1 step"}, objective=counts)
    assert counts.left == -1 - 2


def test_the_state_of_another_training_is_not_taken(tmp_path):
    tiny.run(tmp_path / "a", {"checkpoint_every": "1 step"})
    _, other = tiny.run(tmp_path / "a", {"learning_rate": 0.003})
    assert torch.equal(parameters(other), parameters(tiny.run(tmp_path / "b", {"learning_rate": 0.003})[1]))


def test_how_often_the_state_is_written_and_who_is_told_do_not_make_another_training(tmp_path):
    with pytest.raises(Stops):
        tiny.run(tmp_path, {"checkpoint_every": "1 step"}, objective=StopsAt(5))
    counts = StopsAt(-1)
    tiny.run(tmp_path, {"checkpoint_every": "3 steps", "track": ["tensorboard"]}, objective=counts)
    assert counts.left == -1 - 2


def test_the_scale_of_half_precision_goes_on_where_it_stood(tmp_path):
    given = {"checkpoint_every": "1 step", "precision": "fp16"}
    with pytest.raises(Stops):
        tiny.run(tmp_path / "killed", given, objective=StopsAt(4))
    tiny.run(tmp_path / "killed", given)
    tiny.run(tmp_path / "whole", given)
    killed, whole = (read_state(tmp_path / name / "scratch").facts["scaler"] for name in ("killed", "whole"))
    assert killed == whole
    assert whole["_growth_tracker"] == 6


def test_patience_goes_on_where_it_stood(tmp_path):
    """The best dev loss is that of step 1; step 4 is the third that is not better."""
    given = {"checkpoint_every": "1 step", "evaluate_every": 1, "early_stopping": {"patience": 3}}
    dev = tiny.byte_rows(8, skip=100)
    with pytest.raises(Stops):
        tiny.run(tmp_path, given, objective=tiny.Scored([5, 6], stop=3), dev=dev)
    result, _ = tiny.run(tmp_path, given, objective=tiny.Scored([7, 6, 6, 6]), dev=dev)
    assert result.steps == 4
    assert result.metrics["best_step"] == 1
    assert result.metrics["best_dev_loss"] == pytest.approx(5)


def test_a_state_round_trips_and_only_two_stay(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor(1.5), "c": torch.zeros(0, dtype=torch.bfloat16)}
    for step in (1, 2, 3):
        write_state(tmp_path, step, tensors, {"step": step})
    found = read_state(tmp_path)
    assert found.facts == {"step": 3}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_named_and_leaves_the_state_before(tmp_path, monkeypatch):
    write_state(tmp_path, 1, {"a": torch.ones(3)}, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_module.os, "fsync", full)
    with pytest.raises(DiskError, match="the disk is full"):
        write_state(tmp_path, 2, {"a": torch.ones(3)}, {"step": 2})
    monkeypatch.undo()
    assert read_state(tmp_path).facts == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_the_state_of_another_training_is_put_away_with_a_word(tmp_path, capsys, monkeypatch):
    """Its later steps would otherwise stand before those of the new training, which a kill would then lose."""
    tiny.run(tmp_path, {"budget": "5 steps", "checkpoint_every": "1 step"})
    before = read_state(tmp_path / "scratch")
    write_state(tmp_path / "scratch", 500, before.tensors, before.facts)
    monkeypatch.delenv("GRAFT_QUIET", raising=False)
    _, fresh = tiny.run(tmp_path / "fresh", {"budget": "3 steps"})
    capsys.readouterr()
    _, other = tiny.run(tmp_path, {"budget": "3 steps", "checkpoint_every": "1 step"})
    assert "is of another training (other settings, seed or data): starting anew" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), fresh.parameters(), strict=True))
    assert not [path for path in (tmp_path / "scratch").glob("state-*") if "500" in path.name]


@pytest.mark.parametrize(
    ("cost", "seconds", "share"), [(0, 20, 0), (0.1, 20, 0.005), (1, 200, 0.005), (10, 600, 0.02), (60, 3000, 0.02)]
)
def test_states_cost_half_a_percent_or_are_ten_minutes_apart(cost, seconds, share):
    assert pause(cost) == seconds
    assert cost <= share * seconds


def test_what_writing_a_state_costs_is_guessed_from_its_size_and_then_measured(tmp_path, monkeypatch):
    """A training shorter than that writes none; where the pause is over a state is written."""
    tiny.run(tmp_path / "short")
    assert not (tmp_path / "short" / "scratch").exists()
    costs = []
    monkeypatch.setattr(loop, "pause", lambda cost: costs.append(cost) or 0.0)
    tiny.run(tmp_path / "written", {"ema": 0.9})
    state = read_state(tmp_path / "written" / "scratch")
    size = sum(t.nbytes for name, t in state.tensors.items() if not name.startswith("buffer.") and t.ndim)
    assert costs[0] == size / WRITTEN_A_SECOND
    assert len(set(costs)) == len(costs) == 6
