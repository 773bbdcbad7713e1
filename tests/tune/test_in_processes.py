"""Two processes (gloo, on loopback) tune what one does: few weights on a frozen model in parts, and tasks."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft import models
from graft.adapters.packed import is_packed
from graft.adapters.stack import adapters_of
from graft.facts import facts_of
from graft.tune import VERB

from . import in_processes
from .test_experts import mixed
from .test_full import base, tokenizer_and_ids  # noqa: F401  (a fixture)
from .test_peft_types import ADALORA
from .test_poly import POLY
from .test_several import TASKS, assert_close, encoder, weights  # noqa: F401
from .test_x_lora import XLORA, experts  # noqa: F401

FSDP, OFFLOAD = {"parallel": "fsdp"}, {"parallel": {"method": "fsdp", "offload": "cpu"}}
GATED = {"form": "bottleneck", "insertion": "parallel", "on": ["feed_forward"], "size": 4, "composition": "gated"}
ADAPTERS = {
    "lora": {"method": {"lora": {"rank": 4, "up_rate": 16, "dora": True}}, **FSDP},
    "gated": {"method": {"point": GATED}, "gradient_checkpointing": True, **OFFLOAD},
    "mix": {"method": "mix_and_match", "keep": {"last": 1}, **FSDP},
    "prompt": {"method": "prompt", **FSDP},
    "folded": {"method": {"lora": {"rank": 4}}, "fold": True, **FSDP},
    "experts": {"method": {"lora": {"rank": 3, "on": ["linears", "experts"]}}, "gradient_checkpointing": True, **FSDP},
}
PACKED = {"method": {"lora": {"rank": 4}}, "keep": {"last": 1}, **FSDP}
TWO = {"method": "zero", "stage": 2}
ZERO = {
    "lora": {"method": {"lora": {"rank": 4, "up_rate": 16}}, "parallel": {"method": "zero", "stage": 3}},
    "prefix": {"method": "prefix", "parallel": {"method": "zero", "stage": 2}},
    "folded": {"method": "lora", "fold": True, "keep": {"last": 1}, "parallel": {"method": "zero", "offload": "cpu"}},
}
TEXT = {"colour": "colours", "tag": "words"}
LEARNED, META = {"batches": "in_turn", "learn": {"every": 2}}, {"meta": {"steps": 2, "rows": 2}}
REPTILE, ONE_ROW = {"meta": {"how": "reptile", "rows": 2}}, {"meta": {"steps": 2, "rows": 1}}
OFTEN = {"checkpoint_every": "1 step"}
GATED_FEW = {"method": {"point": GATED}, "accumulate": 2, **OFTEN}
SPREAD = {
    "mixed": {"tasks": TASKS, "given": {"batch_size": 2, "keep": {"last": 1}, **FSDP}},
    "tasks below an adapter": {"tasks": TASKS, "given": {"batch_size": 4, "method": {"lora": {"rank": 2}}, **OFFLOAD}},
    "texts": {"tasks": TEXT, "given": {"batch_size": 2, "method": {"prompt": {"length": 3}}, **FSDP}},
    "learned": {"tasks": TASKS, "given": {"batch_size": 4, "mixing": LEARNED, **OFTEN, **FSDP}, "stop": 4},
    "learned, split": {"tasks": TEXT, "given": {"batch_size": 4, "mixing": LEARNED, "parallel": {"tensor": 2}}},
    "fomaml in parts": {"tasks": TASKS, "given": {"batch_size": 4, "mixing": ONE_ROW, **GATED_FEW, **FSDP}, "stop": 20},
    "reptile in parts": {"tasks": TASKS, "given": {"batch_size": 2, "mixing": REPTILE, **OFFLOAD}},
}
"""Tasks whose rows do not go into every process's batch, and gradients of their own, on weights in parts."""
WHOLE = {f"{name}, whole": {"tasks": case["tasks"], "given": case["given"]}
         for name, case in SPREAD.items() if "stop" in case}  # fmt: skip
"""Those that are killed on the way, without that."""
MULTI = {
    **SPREAD,
    "heads": {"tasks": TASKS, "given": {"batch_size": 8, "mixing": LEARNED}},
    "fomaml": {"tasks": TASKS, "given": {"batch_size": 4, "mixing": META}},
    "reptile": {"tasks": TASKS, "given": {"batch_size": 4, "mixing": REPTILE}},
}
if importlib.util.find_spec("peft") is not None:
    TWICE = {"batch_size": 4, "accumulate": 2, "gradient_checkpointing": True}
    MULTI["adalora"] = {"tasks": TASKS, "given": {"batch_size": 4, "accumulate": 2, "method": {"peft": ADALORA}}}
    MULTI["poly"] = {"tasks": TASKS, "given": {**TWICE, "method": {"peft": POLY}}, "settled": True}
    MULTI["poly in parts"] = {**MULTI["poly"], "given": {**MULTI["poly"]["given"], **FSDP}}


MIXED = {}
"""Mixtures of experts, which read each text twice."""
if importlib.util.find_spec("peft") is not None:
    TRAINED = {**XLORA, "use_trainable_adapters": True, "xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0}
    MIXED = {
        "mixture": {"method": {"peft": XLORA}, "accumulate": 2},
        "mixture in parts": {"method": {"peft": XLORA}, "gradient_checkpointing": True, **FSDP},
        "trained mixture in parts": {"method": {"peft": TRAINED}, **OFFLOAD},
    }


@pytest.fixture(scope="module")
def cases(base, encoder, experts, tmp_path_factory):  # noqa: F811
    """All of them, with what each starts from."""
    starts = {name: str(base) for name in ADAPTERS} | {
        "experts": str(mixed(tmp_path_factory.mktemp("mixed"), "gpt_oss"))
    }
    if importlib.util.find_spec("bitsandbytes") is not None:
        folder = tmp_path_factory.mktemp("packed")
        starts |= {f"on {b} bits": str(graft.quantize(folder / str(b), from_=base, bits=b)) for b in (4, 8)}
    adapters = {name: {"given": ADAPTERS.get(name, PACKED), "start": start} for name, start in starts.items()}
    places = {name: str(place) for name, place in experts.items()}
    adapters |= {name: {"given": {**given, "experts": places}, "start": str(base)} for name, given in MIXED.items()}
    on = {"learned, split": base}  # there is no plan for splitting the encoder
    return adapters | {name: {**case, "start": str(on.get(name, encoder))} for name, case in (MULTI | WHOLE).items()}


def launch(folder, cases, **environment):
    place = ["--standalone", "--nproc_per_node", "2"]
    words = [sys.executable, "-m", "torch.distributed.run", *place, Path(in_processes.__file__), folder]
    done = subprocess.run(
        [*map(str, words), json.dumps(cases)], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory, cases, beside):
    """All cases, trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    beside.together(in_processes.__file__, folder, json.dumps(cases))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, cases):
    """one(name) → the folder of the same case, trained by this process alone."""

    @cache
    def trained(name):
        by_one(folder := tmp_path_factory.mktemp("one"), cases[name])
        return folder

    return trained


def by_one(folder, case):
    """The same case, trained by this process alone."""
    in_processes.as_package()
    given = {key: value for key, value in case["given"].items() if key != "parallel"}
    in_processes.train_case(folder, {**{key: case[key] for key in case if key != "stop"}, "given": given})


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_few_weights_on_a_model_in_parts_are_those_that_one_process_learns(two, one, base, name):  # noqa: F811
    alone = one(name) / "out"
    ids = torch.arange(3, 30)[None]
    wanted = models.load(alone)
    # each process has all of an adapter; transformers writes a whole model in the first alone
    for rank in ("0",) if name == "folded" else ("0", "1"):
        out = two / name / rank / "out"
        found = models.load(out)
        assert type(found).__name__ == type(wanted).__name__
        torch.testing.assert_close(found(ids).logits, wanted(ids).logits, rtol=1e-3, atol=1e-4)
        if name != "folded":
            held, expected = (load_file(folder / "adapter.safetensors") for folder in (out, alone))
            assert_close(held, expected, rtol=1e-3, atol=2e-5)
            assert (out / "adapter.safetensors").stat().st_size < 0.7 * (base / "model.safetensors").stat().st_size
            assert adapters_of(found).points.keys() == adapters_of(wanted).points.keys()
    if name == "mix":
        kept = models.load(two / name / "0" / "out" / "checkpoints" / "step-4")
        assert torch.equal(kept(ids).logits, models.load(two / name / "0" / "out")(ids).logits)


@pytest.mark.parametrize("name", list(MIXED))
def test_a_mixture_of_experts_is_the_one_that_one_process_learns(two, one, name):
    alone, ids = one(name) / "out", torch.arange(3, 30)[None]
    wanted = models.load(alone)(ids).logits
    losses = [row["loss"] for row in logged(alone)]
    assert len(set(losses)) == len(losses)
    for rank in ("0", "1"):
        out = two / name / rank / "out"
        torch.testing.assert_close(models.load(out)(ids).logits, wanted, rtol=1e-3, atol=1e-4)
        held, expected = (load_file(folder / "adapter.safetensors") for folder in (out, alone))
        assert_close(held, expected, rtol=1e-3, atol=2e-5)
    assert [row["loss"] for row in logged(two / name / "0" / "out")] == pytest.approx(losses, rel=1e-5)


def logged(folder):
    """What a training said of its steps."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("name", list(MULTI))
def test_tasks_in_two_processes_are_tasks_in_one(two, one, name):
    """With heads that some batches do not reach, weights that are learned on the way, and episodes."""
    assert_close(weights(one(name) / "out"), weights(two / name / "0" / "out"), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_packed_weights_learns_in_two_processes_what_it_learns_in_one(two, one, bits):
    """The packed weights are whole in both, the rest is in parts."""
    pytest.importorskip("bitsandbytes")
    wanted = load_file(one(f"on {bits} bits") / "out" / "adapter.safetensors")
    # 8 bits round the activations too
    tolerance = {"rtol": 1e-3, "atol": 2e-5} if bits == 4 else {"rtol": 1e-2, "atol": 1e-3}
    for place in (Path("out"), Path("out/checkpoints/step-4")):
        found = load_file(two / f"on {bits} bits" / "0" / place / "adapter.safetensors")
        assert_close(found, wanted, **tolerance)
    assert any(map(is_packed, models.load(two / f"on {bits} bits" / "1" / "out").modules()))


@pytest.mark.parametrize("name", list(SPREAD))
def test_what_tasks_in_parts_report_is_what_one_process_reports(two, one, name):
    logs = [[json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
            for folder in (one(name), two / name / "0")]  # fmt: skip
    assert len(logs[0]) == len(logs[1]) > 0
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (one(name), two / name / "0")]
    mixtures = [{key: value for key, value in metrics.items() if key.startswith("weight/")} for metrics in found]
    assert len(mixtures[0]) == (len(SPREAD[name]["tasks"]) if "learned" in name else 0)
    assert mixtures[0] == pytest.approx(mixtures[1], abs=1e-5)
    for one, other in zip(*logs, strict=True):
        for key in ("step", "tokens", "loss", "dev_loss", "grad_norm"):
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), abs=2e-4), (one, other)


@pytest.mark.parametrize("name", [name for name in SPREAD if "stop" in SPREAD[name]])
def test_killed_tasks_in_parts_end_with_the_same_bytes(two, name):
    files = lambda folder: {p.relative_to(folder): p.read_bytes()  # noqa: E731
                            for p in sorted((folder / "0" / "out").rglob("*.safetensors"))}  # fmt: skip
    assert files(two / name) == files(two / f"{name}, whole") != {}


@pytest.mark.parametrize("mixing", [LEARNED, META], ids=["learned", "meta"])
def test_gradients_beside_the_training_go_with_every_placement(monkeypatch, base, mixing):  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    given = {"from": "base", "tasks": TEXT, "mixing": mixing}
    spread = [{"method": "zero", "stage": stage} for stage in (1, 2, 3)] + ["zero", "fsdp", {"tensor": 2}]
    settings = [VERB.parse({**given, "parallel": parallel}) for parallel in spread]
    monkeypatch.undo()
    assert [VERB.check(one, {"base": facts_of(base)}) for one in settings] == [[]] * 6


def test_layers_are_not_split_below_an_adapter(base):  # noqa: F811
    facts = {"base": facts_of(base)}
    split = {"from": "base", "data": "d", "parallel": {"tensor": 2}}
    assert VERB.check(VERB.parse(split), facts) == []
    assert "adapters read and change whole layers" in VERB.check(VERB.parse({**split, "method": "lora"}), facts)[0]


@pytest.mark.deepspeed
def test_few_weights_are_learned_under_deepspeed_too(tmp_path, base):  # noqa: F811
    pytest.importorskip("deepspeed")
    cases = {name: {"given": given, "start": str(base)} for name, given in ZERO.items()}
    if importlib.util.find_spec("bitsandbytes") is not None:
        packed = graft.quantize(tmp_path / "packed", from_=base, bits=4)
        cases["packed"] = {"given": {**ZERO["lora"], "parallel": TWO}, "start": str(packed)}
    launch(tmp_path / "two", cases, **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}))
    for name, case in cases.items():
        by_one(tmp_path / name, case)
        file = "model.safetensors" if name == "folded" else "adapter.safetensors"
        found, wanted = (
            load_file(folder / "out" / file) for folder in (tmp_path / "two" / name / "0", tmp_path / name)
        )
        assert_close(found, wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tasks_as_text_are_learned_under_deepspeed_too(tmp_path, encoder, stage):  # noqa: F811
    pytest.importorskip("deepspeed")
    spread = {"method": "zero", "stage": stage}
    given = {"batch_size": 4, "accumulate": 2, **OFTEN, "parallel": spread}
    mixings = {"mixed": {}, "learned": LEARNED, "fomaml": META, "reptile": REPTILE}
    cases = {name: {"tasks": TEXT, "given": {**given, "mixing": how}} for name, how in mixings.items()}
    away = {"mixing": META, "method": {"lora": {"rank": 3}}, "parallel": {**spread, "offload": "cpu"}}
    cases["few, away"] = {"tasks": TEXT, "given": {**given, **away, "gradient_checkpointing": True}}
    cases["killed"] = {**cases["learned"], "stop": 12}
    cases = {name: {**case, "start": str(encoder)} for name, case in cases.items()}
    launch(tmp_path / "two", cases, **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}))
    for name, case in cases.items():
        by_one(tmp_path / name, case)
        assert_close(weights(tmp_path / name / "out"), weights(tmp_path / "two" / name / "0/out"), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("method", "stage", "words"),
    [
        ({"point": GATED}, 2, "cannot spread single numbers"),
        ("prompt", 3, "learned tokens are read before DeepSpeed"),
        ("prompt", 2, None),
        ("lora", 3, None),
    ],
)
def test_adapters_that_deepspeed_cannot_spread_are_refused_before_work(monkeypatch, base, method, stage, words):  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    given = {"from": "base", "data": "d", "method": method, "parallel": {"method": "zero", "stage": stage}}
    settings = VERB.parse(given)
    monkeypatch.undo()
    found = VERB.check(settings, {"base": facts_of(base)})
    assert (words is None and not found) or words in found[0]


def test_heads_that_deepspeed_would_move_where_a_step_does_not_reach_them_are_refused(monkeypatch, base):  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    facts, zero = {"base": facts_of(base)}, {"from": "base", "parallel": {"method": "zero", "stage": 1}}
    one, several, texts = (VERB.parse({**zero, "tasks": t}) for t in ({"tag": TASKS["tag"]}, TASKS, TEXT))
    monkeypatch.undo()
    assert "heads that a step does not reach stay as they are" in VERB.check(several, facts)[0]
    assert VERB.check(one, facts) == VERB.check(texts, facts) == []
