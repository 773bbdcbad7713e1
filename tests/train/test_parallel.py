"""Weights spread over two processes (gloo, on loopback) learn what one does, and go on where a kill left them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import together
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graft.errors import RequestError, SettingsError
from graft.settings import parse
from graft.train.parallel import Parallel, problems
from graft.train.state import read_state

MORE = {"accumulate": 2, "evaluate_every": 3, "keep": {"last": 1}, "ema": 0.9, "checkpoint_every": "1 step"}
EIGHT = {"optimizer": "adamw_8bit", "checkpoint_every": "1 step"}
CASES = {
    "fsdp": {"given": {**MORE, "parallel": "fsdp"}, "stop": 7},
    "offload": {"given": {**MORE, "parallel": {"method": "fsdp", "offload": "cpu"}, "gradient_checkpointing": True}},
    "tensor": {"given": {**MORE, "parallel": {"tensor": 2}}, "stop": 7, "whole": True},
    "whole": {"given": {**MORE, "parallel": "fsdp"}},
    "states": {"given": {"checkpoint_every": "1 step", "parallel": "fsdp"}},
    "bf16": {"given": {"precision": "bf16", "parallel": "fsdp"}},
    "eight": {"given": {**EIGHT, "parallel": "fsdp"}, "stop": 4, "width": 64},
    "eight, whole": {"given": {**EIGHT, "parallel": "fsdp"}, "width": 64},
}
if importlib.util.find_spec("bitsandbytes") is None:
    CASES = {name: case for name, case in CASES.items() if "eight" not in name}


ROUGH = ("bf16", "eight", "eight, whole")


def launch(script, folder, cases, **environment):
    place = ["--standalone", "--nproc_per_node", "2"]
    listed = [{"name": name, **case} for name, case in cases.items()]
    command = [sys.executable, "-m", "torch.distributed.run", *place, script, folder, json.dumps(listed)]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory, beside):
    """All cases, trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    listed = [{"name": name, **case} for name, case in CASES.items()]
    beside.together(together.__file__, folder, json.dumps(listed))
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_that_share_the_weights_are_one(two, tmp_path, name):
    given = {key: value for key, value in CASES[name]["given"].items() if key != "parallel"}
    rough = name in ROUGH
    together.train_case(tmp_path, given, width=CASES[name].get("width", 16))
    mine, theirs = load_file(tmp_path / "weights"), load_file(two / name / "weights")
    assert mine.keys() == theirs.keys()
    # sums of gradients, and with `tensor` of products, are added in another order; in bf16 a gradient near zero may
    # then have another sign, and Adam's first steps go by signs; halves of small matrices have moments of 32 bits
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if rough else {"rtol": 1e-4, "atol": 2e-5}
    for key, tensor in mine.items():
        torch.testing.assert_close(theirs[key], tensor, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
    logs = tiny.log(tmp_path), tiny.log(two / name)
    assert len(logs[0]) == len(logs[1])
    for a, b in zip(*logs, strict=True):
        assert {k: a[k] for k in ("step", "tokens") if k in a} == {k: b[k] for k in ("step", "tokens") if k in b}
        for key in ("loss", "dev_loss", "ema_dev_loss", "grad_norm"):
            assert (key in a) == (key in b)
            assert abs(a.get(key, 0) - b.get(key, 0)) < (2e-2 if rough else 2e-4), (a, b)


@pytest.mark.parametrize(("killed", "whole"), [("fsdp", "whole"), ("eight", "eight, whole")])
def test_a_killed_training_in_parts_ends_with_the_same_bytes(two, killed, whole):
    if killed not in CASES:
        pytest.skip("needs bitsandbytes")
    files = lambda name: {p.relative_to(two / name): p.read_bytes()  # noqa: E731
                          for p in sorted((two / name / "out").rglob("*.safetensors"))}  # fmt: skip
    assert files(killed) == files(whole)
    assert (two / killed / "weights").read_bytes() == (two / whole / "weights").read_bytes()
    assert [e["step"] for e in tiny.log(two / killed)] == [e["step"] for e in tiny.log(two / whole)]


@pytest.mark.parametrize("name", ["fsdp", "tensor"])
def test_checkpoints_on_the_way_are_complete_folders(two, tmp_path, name):
    checkpoints = sorted((two / name / "out" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["ema", "step-6"]
    for path in checkpoints:
        model = AutoModelForCausalLM.from_pretrained(path)
        assert model.config.architectures == ["LlamaForCausalLM"]
    last = AutoModelForCausalLM.from_pretrained(two / name / "out" / "checkpoints" / "step-6")
    weights = load_file(two / name / "weights")
    assert all(torch.equal(p, weights[key]) for key, p in last.named_parameters())


def test_a_state_in_parts_is_written_whole_and_one_process_goes_on_from_it(two, tmp_path):
    """The state after step 5 of two processes; the rest by one, as if the machine had changed."""
    folder = tmp_path / "a"
    shutil.copytree(two / "states", folder)
    states = sorted((folder / "scratch").glob("state-*"))
    assert len(states) == 2
    states[-1].unlink()
    before = read_state(folder / "scratch")
    assert before.facts["at"]["step"] == 5
    assert {name: t.shape for name, t in before.tensors.items() if name.startswith("model.")} == {
        f"model.{name}": p.shape for name, p in tiny.tiny_model().named_parameters()
    }
    weights = load_file(folder / "weights")
    _, model = tiny.run(folder, {"checkpoint_every": "1 step"}, dev=tiny.byte_rows(20, skip=100))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-5, atol=1e-6)
    assert [entry["step"] for entry in tiny.log(folder) if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_one_process_may_offload_too_and_changes_no_byte(tmp_path):
    """Spread over one process is not spread: the same sums in the same order."""
    given = {"parallel": {"method": "fsdp", "offload": "cpu"}, "checkpoint_every": "2 steps"}
    together.train_case(tmp_path / "spread", given)
    together.train_case(tmp_path / "plain", {})
    a, b = (load_file(tmp_path / name / "weights") for name in ("spread", "plain"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "fdsp"}, "fdsp"),
        ({"method": "ddp", "offload": "cpu"}, "expected `offload` with `fsdp` or `zero`"),
        ({"method": "fsdp", "stage": 2}, "expected `stage` with `method: zero` only"),
        ({"method": "ddp", "tensor": 2}, "expected `tensor` with `method: fsdp`"),
        ({"tensor": 2, "devices": 3}, "expected `devices` to be a multiple of `tensor`, found 3 and 2"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused(given, words):
    with pytest.raises(SettingsError, match=words):
        parse(Parallel, given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"compile": True}, "expected `compile: false`"),
        ({"precision": "fp16"}, "fp32 or bf16"),
        ({"optimizer": "paged_adamw_8bit"}, "expected `optimizer: adamw or adamw_8bit` with `parallel: fsdp`"),
    ],
)
def test_what_weights_in_parts_cannot_be_trained_with_is_refused(given, words):
    with pytest.raises(SettingsError, match=words):
        tiny.settings(parallel="fsdp", **given)


def test_other_processes_than_were_planned_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"expected 4 processes \(`parallel.devices`\), found 1"):
        tiny.run(tmp_path, {"parallel": {"method": "fsdp", "devices": 4}})
    with pytest.raises(RequestError, match=r"expected processes in groups of 2 \(`parallel.tensor`\), found 1"):
        tiny.run(tmp_path, {"parallel": {"tensor": 2}})


def test_where_weights_lie_is_no_part_of_what_decides_the_result():
    plain, spread = tiny.settings(), tiny.settings(parallel={"method": "fsdp", "devices": 2})
    assert plain.content() == spread.content()
    assert "parallel" not in plain.content()
    assert spread.plain()["parallel"]["method"] == "fsdp"


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 16,
          "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
}


@pytest.mark.parametrize(
    ("given", "config", "kind", "words"),
    [
        ({"tensor": 2}, CONFIG, {}, None),
        ({"method": "fsdp"}, GPT2, {"adapter": True}, None),
        ({"method": "ddp"}, GPT2, {"quantised": True}, None),
        ({"tensor": 2}, GPT2, {}, "no plan for splitting GPT2LMHeadModel"),
        ({"tensor": 4}, CONFIG, {}, "expected heads that `parallel.tensor: 4` divides, found num_attention_heads 2"),
        ({"tensor": 2}, CONFIG, {"adapter": True}, "adapters read and change whole layers"),
        ({"method": "fsdp"}, CONFIG, {"quantised": True, "adapter": True}, None),
        ({"tensor": 2}, CONFIG, {"quantised": True, "adapter": True}, "adapters read and change whole layers"),
        ({"method": "zero", "stage": 2}, CONFIG, {"quantised": True, "adapter": True}, None),
        ({"method": "zero", "stage": 3}, CONFIG, {"quantised": True, "adapter": True}, "use stage 1 or 2, or"),
    ],
)
def test_what_speaks_against_it_is_found_before_work(monkeypatch, given, config, kind, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    found = problems(parse(Parallel, given), config, **{"adapter": False, "quantised": False, **kind})
    assert (words is None and not found) or words in found[0]
