"""DeepSpeed's ZeRO: the setting everywhere; trainings by two processes where the package is installed (CPU or GPU)."""

import importlib.util
from pathlib import Path

import pytest
import test_parallel
import tiny
import together
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graft.errors import SettingsError
from graft.settings import parse
from graft.train.parallel import TOGETHER, Parallel
from graft.train.zero import configuration

MORE = {"accumulate": 2, "evaluate_every": 3, "keep": {"last": 1}, "checkpoint_every": "1 step"}
CASES = {
    "one": {"given": {**MORE, "parallel": {"method": "zero", "stage": 1}}, "stop": 7},
    "two": {"given": {**MORE, "parallel": {"method": "zero", "stage": 2}}, "stop": 7},
    "three": {"given": {**MORE, "parallel": {"method": "zero", "stage": 3}}, "stop": 7, "whole": True},
    "offload": {"given": {**MORE, "parallel": {"method": "zero", "offload": "cpu"}}, "whole": True},
    "bf16": {"given": {**MORE, "precision": "bf16", "parallel": {"method": "zero", "stage": 3}}, "whole": True},
}

ROOMS = {
    "reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
}  # fmt: skip
"""What says how much is sent, or whole, at a time."""


def zero(monkeypatch, **given):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    return parse(Parallel, {"method": "zero", **given})


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else plain(name))
    with pytest.raises(SettingsError, match=r"needs the package deepspeed: pip install 'graft\[deepspeed\]'"):
        parse(Parallel, {"method": "zero", "stage": 2})


@pytest.mark.parametrize(
    ("given", "spread", "wanted"),
    [
        ({"stage": 1}, 1, {"stage": 1}),
        ({"stage": 2, "offload": "cpu"}, 2, {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
        (
            {"offload": "cpu"},
            3,
            {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        ),
    ],
)
def test_stages_and_offload_are_what_deepspeed_is_told(monkeypatch, given, spread, wanted):
    parallel = zero(monkeypatch, **given)
    assert parallel.spread == spread
    told = configuration(parallel, tiny.settings(accumulate=4, clip=0.5))
    rooms = {key: told["zero_optimization"].pop(key) for key in list(told["zero_optimization"]) if key in ROOMS}
    assert told["zero_optimization"] == wanted
    assert len(rooms) == (5 if spread == 3 else 2)
    assert max(rooms.values()) == TOGETHER
    assert (told["gradient_accumulation_steps"], told["gradient_clipping"]) == (4, 0.5)
    assert not told["torch_autocast"]["enabled"]
    half = configuration(parallel, tiny.settings(clip=None, precision="bf16"))
    assert (half["gradient_clipping"], half["torch_autocast"]["enabled"]) == (0.0, True)


def test_an_average_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    with pytest.raises(SettingsError, match="found zero, which holds weights its own way"):
        tiny.settings(parallel="zero", ema=0.9)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """All cases, trained by two processes."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    environment = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    test_parallel.launch(Path(together.__file__), folder, CASES, **environment)
    return folder


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_under_deepspeed_are_one(two, tmp_path, name):
    """A training that is killed in its fourth step and goes on."""
    given = {key: value for key, value in CASES[name]["given"].items() if key != "parallel"}
    together.train_case(tmp_path, given)
    mine, theirs = load_file(tmp_path / "weights"), load_file(two / name / "weights")
    for key, tensor in mine.items():
        if name == "bf16":  # a gradient near zero may have another sign, and Adam's first steps go by signs
            assert (theirs[key] - tensor).abs().mean() < 2e-3
        else:
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=2e-5)
    logs = tiny.log(tmp_path), tiny.log(two / name)
    assert len(logs[0]) == len(logs[1])
    for a, b in zip(*logs, strict=True):
        for key in ("loss", "dev_loss", "grad_norm"):
            assert abs(a.get(key, 0) - b.get(key, 0)) < (3e-2 if name == "bf16" else 2e-4), (a, b)
    kept = AutoModelForCausalLM.from_pretrained(two / name / "out" / "checkpoints" / "step-6")
    assert all(torch.equal(p, theirs[key]) for key, p in kept.named_parameters())
