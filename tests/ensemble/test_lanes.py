"""Members on several devices speak at the same time and say what they say one after the other."""

import copy
import json
import pickle
import threading

import pytest
import torch
from test_classification import bert, texts
from test_ensemble_folder import facts, family, made, run  # noqa: F401
from test_gate import gated as gated_decoders
from test_gate import looking_at_one
from test_seq2seq import PLAIN, bart, source, t5
from tiny_members import five, gpt2, llama, prompts, qwen
from typer.testing import CliRunner

from graft import models
from graft.cli import app
from graft.ensemble import VERB
from graft.ensemble.lanes import Lanes
from graft.ensemble.members import device_of
from graft.ensemble.model import ensemble_of
from graft.errors import RunError


def apart(ensemble):
    """The same ensemble with every member in a lane of its own; which thread each ran in is noted in `threads`."""
    threads = {}
    for number, (entry, member) in enumerate(zip(ensemble.config.members, ensemble.members, strict=True)):
        entry["device"] = f"cpu:{number}"
        member.register_forward_pre_hook(
            lambda *_, number=number: threads.setdefault(number, set()).add(threading.current_thread().name)
        )
    return ensemble, threads


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"do_sample": True}, {}])
def test_decoders_in_lanes_decode_as_one_after_the_other(way):
    plain, (ensemble, threads) = ensemble_of(five()), apart(ensemble_of(five()))
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None, **way}
    torch.manual_seed(1)
    expected = plain.generate(ids, **given)
    torch.manual_seed(1)
    assert torch.equal(ensemble.generate(ids, **given), expected)
    names = [next(iter(names)) for names in threads.values()]
    assert all(len(names) == 1 for names in threads.values())
    assert len(set(names)) == 5


def test_a_gate_that_leaves_members_out_and_speculation_work_in_lanes():
    trio = {"a": qwen(), "small": llama(), "b": gpt2()}
    plain = gated_decoders(trio, looking_at_one(0.3, states=True))
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None}
    expected = plain.generate(ids, do_sample=False, **given)
    ensemble, threads = apart(plain)
    assert torch.equal(ensemble.generate(ids, do_sample=False, **given), expected)
    assert torch.equal(ensemble.speculate(ids, **given).sequences, expected)
    assert len(threads) == 3


def test_translators_and_classifiers_in_lanes():
    ids, mask = source()
    pair = {"t5": t5(1), "bart": bart(3)}
    expected = ensemble_of(pair).generate(ids, attention_mask=mask, num_beams=2, **PLAIN)
    ensemble, threads = apart(ensemble_of(pair))
    assert torch.equal(ensemble.generate(ids, attention_mask=mask, num_beams=2, **PLAIN), expected)
    assert threads[0] != threads[1]
    ids, mask = texts()
    both = {"a": bert(1), "b": bert(2)}
    told = ensemble_of(both)(input_ids=ids, attention_mask=mask).logits
    ensemble, threads = apart(ensemble_of(both))
    assert torch.equal(ensemble(input_ids=ids, attention_mask=mask).logits, told)
    assert threads[0] != threads[1]


def test_lanes_run_beside_each_other():
    """Each call waits for the other: one after the other they would never end."""
    meet = threading.Barrier(2, timeout=120)
    found = Lanes().run(
        ["cpu:0", "cpu:1", "cpu:0"], [lambda: (meet.wait(), 1)[1], lambda: (meet.wait(), 2)[1], lambda: 3]
    )
    assert found == [1, 2, 3]


@pytest.mark.parametrize("lane", ["cpu:0", "cpu:1"])
def test_what_fails_in_a_lane_is_raised_after_all_have_ended(lane):
    ended = threading.Event()

    def fails():
        raise RunError("here")

    other = {"cpu:0": "cpu:1", "cpu:1": "cpu:0"}[lane]
    calls = {lane: fails, other: ended.set}
    with pytest.raises(RunError, match="here"):
        Lanes().run(list(calls), list(calls.values()))
    assert ended.is_set()


def test_nan_of_a_member_in_another_lane_names_it():
    bad = qwen()
    with torch.no_grad():
        list(bad.parameters())[-1].fill_(float("nan"))
    ensemble, _ = apart(ensemble_of({"fine": llama(), "bad": bad}))
    ids, mask = prompts()
    with pytest.raises(RunError, match=r"member 'bad' \(.*\) gives NaN logits: check its weights"):
        ensemble.generate(ids, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_and_autocast_are_as_in_the_callers_thread(mode):
    def conduct():
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    for cast in (True, False):
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            assert set(Lanes().run(["cpu:0", "cpu:1"], [conduct, conduct])) == {conduct()}


def test_gradients_flow_into_members_of_all_lanes():
    ids, _ = prompts(padded=())
    pair = {"a": llama(), "b": qwen()}
    ensemble_of(pair)(input_ids=ids, labels=ids).loss.backward()
    expected = [weight.grad.clone() for model in pair.values() for weight in model.parameters()]
    ensemble, _ = apart(ensemble_of(pair))
    ensemble.zero_grad()
    ensemble(input_ids=ids, labels=ids).loss.backward()
    found = [weight.grad for model in pair.values() for weight in model.parameters()]
    assert all(torch.allclose(*both, atol=1e-6) for both in zip(found, expected, strict=True))


def test_an_ensemble_that_has_run_in_lanes_can_be_copied():
    ensemble, _ = apart(ensemble_of({"a": llama(), "b": qwen()}))
    ids, _ = prompts(padded=())
    with torch.no_grad():
        told = ensemble(input_ids=ids).logits
        assert torch.equal(copy.deepcopy(ensemble)(input_ids=ids).logits, told)
    assert isinstance(pickle.loads(pickle.dumps(ensemble.lanes)), Lanes)


def test_a_command_and_python_give_members_their_devices(family):  # noqa: F811
    members = [{"model": str(family / "llama"), "device": "cpu:0"}, {"model": str(family / "gpt2"), "device": "cpu:1"}]
    out = family.parent / "made"
    done = CliRunner().invoke(app, ["ensemble", str(out), "--members", json.dumps(members)])
    assert done.exit_code == 0, done.output
    loaded = models.load(out)
    assert [entry["device"] for entry in loaded.config.members] == ["cpu:0", "cpu:1"]
    plain = models.load(run(family, {"members": ["llama", "gpt2"]}, name="plain")[0])
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **given), plain.generate(ids, **given))


def test_a_device_that_this_machine_does_not_have_is_refused_before_anything_runs(family):  # noqa: F811
    raw = {"members": ["llama", {"model": "gpt2", "device": "cuda:77"}]}
    (problem,) = VERB.check(VERB.parse(raw), facts(family, "llama", "gpt2"))
    assert problem.startswith("gpt2: expected a device of this machine (cpu")
    assert "found 'cuda:77'" in problem


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
def test_a_member_on_a_gpu_beside_one_on_the_cpu():
    pair = {"a": llama(), "b": qwen()}
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    expected = ensemble_of(pair).generate(ids, **given)
    ensemble = ensemble_of(pair)
    ensemble.config.members[1]["device"] = "cuda:0"
    ensemble.to("cpu")
    assert torch.equal(ensemble.generate(ids, **given), expected)
    assert torch.equal(ensemble.speculate(ids, **given).sequences, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_members_on_two_gpus():
    pair = {"a": llama(), "b": qwen()}
    ids, mask = prompts()
    given = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    expected = ensemble_of(pair).generate(ids, attention_mask=mask, **given)
    ensemble = ensemble_of(pair)
    for number, entry in enumerate(ensemble.config.members):
        entry["device"] = f"cuda:{number}"
    ensemble.to("cuda:0")
    found = ensemble.generate(ids.to("cuda:0"), attention_mask=mask.to("cuda:0"), **given)
    assert torch.equal(found.cpu(), expected)


def test_a_module_is_where_its_first_weight_is():
    within = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ModuleList([torch.nn.Linear(2, 2, device="meta")]))
    for module in (*five().values(), within, torch.nn.Sequential(torch.nn.Linear(1, 1), within)):
        assert device_of(module) == next(module.parameters()).device
