"""Merges that are judged in memory: the numbers are those of the written merge, and none is judged twice."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import save_file
from small_family import tensors
from trained_family import job

from graft.errors import CheckpointError
from graft.evaluate import parse
from graft.evaluate.judge import Judge
from graft.merge import VERB, candidates
from graft.merge.candidates import Candidates, InMemory, Seat

TUNED = ["up", "down", "jump"]


MERGES = [
    {"method": "task_arithmetic", "base": "base", "models": {"up": 0.7, "down": 0.2}, "scale": 0.8},
    {"method": "ties", "base": "base", "models": TUNED, "density": 0.3, "scale": [0.2, 0.9]},
    {"method": "dare_linear", "base": "base", "models": TUNED, "density": 0.6},
    {"method": "slerp", "models": ["up", "jump"], "t": 0.3},
]


@pytest.mark.parametrize("settings", MERGES, ids=lambda settings: settings["method"])
def test_a_merge_in_memory_is_the_one_that_is_written(settings, merge, root, data, trained, measured, tmp_path):
    out, _ = merge(settings, seed=3)
    asked = job(settings, trained, data, root, tmp_path / "seat", seed=3)
    with Seat(asked, tmp_path / "seat") as seat:
        # the first is written and loaded; what is compared goes into the memory of that
        seat.take(VERB.parse({"method": "linear", "models": asked.settings.parents}))
        held = seat.model
        seat.take(asked.settings)
        assert seat.model is held
        judge = Judge.of(parse([{"measure": "bits_per_byte", "on": ["all.dev"]}])[0], data, root)
        assert judge.value(seat.model, seat.tokenizer) == measured(out)
        state, written = seat.model.state_dict(), tensors(out)
        assert all(torch.equal(state[name], written[name]) for name in written)


def test_in_another_dtype_the_merge_in_memory_is_the_written_one_too(merge, root, data, trained, tmp_path):
    settings = {"method": "linear", "models": {"up": 0.3, "down": 0.7}, "dtype": "bfloat16"}
    out, _ = merge(settings)
    asked = job(settings, trained, data, root, tmp_path / "seat")
    with Seat(asked, tmp_path / "seat") as seat:
        seat.take(VERB.parse(settings | {"models": {"up": 0.9, "down": 0.1}}))
        seat.take(asked.settings)
        state, written = seat.model.state_dict(), tensors(out)
        assert all(torch.equal(state[name], written[name]) for name in written)
        assert {value.dtype for value in written.values()} == {torch.bfloat16}


def test_tokenizer_and_configuration_are_those_that_the_merge_would_be_written_with(root, data, trained, tmp_path):
    other = shutil.copytree(trained["down"], tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    models = trained | {"other": other}
    asked = job({"method": "linear", "models": ["up", "other"]}, models, data, root, tmp_path / "seat")
    with Seat(asked, tmp_path / "seat") as seat:
        seat.take(asked.settings)
        assert seat.tokenizer.chat_template is None
        seat.take(VERB.parse({"method": "linear", "models": ["other", "up"]}))
        assert seat.tokenizer.chat_template.endswith("!")
        assert seat.model.config.rms_norm_eps == 0.5


def test_where_loading_converts_tensors_every_merge_is_written_and_loaded(
    root, data, trained, tmp_path, monkeypatch, measured, merge
):
    monkeypatch.setattr(candidates, "stored_names", lambda model, folder: None)
    settings = {"method": "slerp", "models": ["up", "jump"], "t": 0.3}
    out, _ = merge(settings)
    asked = job(settings, trained, data, root, tmp_path / "seat")
    with Candidates(asked, greedy({"on": "all.dev"})) as judged:
        first, second = judged.values([VERB.parse(settings | {"t": 0.9}), asked.settings])
    assert second == measured(out)
    assert first != second


def greedy(judged):
    return VERB.parse({"method": "greedy_soup", "models": ["up"], **judged})


def test_no_merge_is_judged_twice_even_after_a_kill(root, data, trained, tmp_path, monkeypatch):
    settings = {"base": "base", "models": TUNED, "method": "ties"}
    settings |= {"search": {"over": {"scale": [0, 1.5], "density": [0.1, 1]}, "on": "all.dev", "evaluations": 14}}
    whole = VERB.run(job(settings, trained, data, root, tmp_path / "whole", seed=7))["notes"]["search"]

    judged, real = [], candidates.judged_in

    def counted(seat, judge, merge, seed):
        if len(judged) == 9:
            raise KeyboardInterrupt
        judged.append((merge.scale, merge.density))
        return real(seat, judge, merge, seed)

    monkeypatch.setattr(candidates, "judged_in", counted)
    killed = job(settings, trained, data, root, tmp_path / "killed", seed=7)
    with pytest.raises(KeyboardInterrupt):
        VERB.run(killed)
    monkeypatch.setattr(candidates, "judged_in", lambda *asked: (judged.append(asked), real(*asked))[1])
    again = VERB.run(killed)["notes"]["search"]
    assert again == whole
    assert len(judged) == 15
    made, expected = tensors(tmp_path / "killed"), tensors(tmp_path / "whole")
    assert all(torch.equal(made[name], expected[name]) for name in expected)


def test_what_is_not_in_the_type_of_the_merge_is_brought_over_at_the_end():
    """As on another device: the model's own tensors stay as they are until all is written."""
    target = {"w": torch.zeros(2, 3, dtype=torch.float64), "v": torch.zeros(4)}
    writer = InMemory(target, {"w": ("F32", (2, 3)), "v": ("F32", (4,))})
    values = torch.arange(6, dtype=torch.float32)
    writer.write("w", 8, values.numpy().tobytes()[8:])
    writer.write("v", 4, values.numpy().tobytes()[4:12])
    assert target["v"].tolist() == [0, 1, 2, 0]
    assert not target["w"].any()
    writer.write("w", 0, values.numpy().tobytes()[:8])
    writer.close()
    assert target["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_where_one_is_stopped_the_rest_is_not_judged():
    begun = []

    def judge(settings, seed):
        begun.append(settings)
        if len(begun) == 3:
            raise KeyboardInterrupt
        time.sleep(0.1)
        return 1.0

    found = []
    with pytest.raises(KeyboardInterrupt):
        for key, _ in candidates._judged([judge, judge], {str(number): (number, 0) for number in range(50)}):
            found.append(key)
    assert len(found) < 5
    assert len(begun) < 8


def test_every_merge_is_given_to_a_judge_that_is_free():
    busy, most = [], []

    def judge_of(name):
        def judge(settings, seed):
            assert name not in busy
            busy.append(name)
            most.append(len(busy))
            time.sleep(0.01)
            busy.remove(name)
            return settings * 2.0

        return judge

    found = dict(candidates._judged([judge_of(n) for n in "abc"], {str(n): (n, 0) for n in range(12)}))
    assert found == {str(n): 2.0 * n for n in range(12)}
    assert max(most) == 3


def written(folder):
    """Files of weights that lie below."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")]


@pytest.mark.parametrize("jobs", [1, 2])
def test_nothing_of_a_seat_is_left_when_all_is_judged(jobs, root, data, trained, tmp_path):
    asked = job({"method": "linear", "models": ["up", "down"]}, trained, data, root, tmp_path / "seat")
    with Candidates(asked, greedy({"on": "all.dev"}), jobs) as judged:
        judged.values([VERB.parse({"method": "slerp", "models": ["up", "down"], "t": t}) for t in (0.2, 0.7)])
        assert len(written(asked.scratch)) == jobs
    assert written(asked.scratch) == []


def test_nothing_of_a_seat_is_left_when_its_first_merge_fails(root, data, trained, tmp_path):
    sick = shutil.copytree(trained["down"], tmp_path / "sick")
    held = tensors(sick)
    held["model.norm.weight"][3] = float("nan")
    save_file(held, sick / "model.safetensors", metadata={"format": "pt"})
    settings = {"method": "linear", "models": ["up", "sick"], "anyway": True}
    asked = job(settings, trained | {"sick": sick}, data, root, tmp_path / "seat")
    failing = pytest.raises(CheckpointError, match=r"sick: NaN or Inf in model.norm.weight")
    with failing, Candidates(asked, greedy({"on": "all.dev"})) as judged:
        judged.values([asked.settings])
    assert written(asked.scratch) == []
