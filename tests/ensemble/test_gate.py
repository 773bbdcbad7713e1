"""Weights that follow the context: fitted, saved, decoded; gradients flow into the gate and nowhere else."""

import math

import pytest
import torch
from tiny_members import gpt2, llama, prompts, qwen

from graft.ensemble import linear
from graft.ensemble.gate import Gate, features, fit_gate
from graft.ensemble.model import EnsembleConfig, EnsembleForCausalLM, ensemble_of
from graft.ensemble.weights import fit_linear
from graft.errors import RequestError


def taking_turns(tokens=400):
    """Two members, each right and sure on every other token and unsure elsewhere."""
    generator = torch.Generator().manual_seed(0)
    gold = torch.randint(0, 9, (tokens,), generator=generator)
    told = []
    for member in range(2):
        scores = torch.randn(tokens, 9, generator=generator) * 0.3
        knows = torch.arange(tokens) % 2 == member
        scores[knows, gold[knows]] += 5
        told.append(scores.log_softmax(-1))
    return told, gold


def loss(gate, told, gold):
    mixed = linear.combine(told, gate(features(told)), linear.Settings())
    return -mixed.gather(-1, gold[:, None]).mean().item()


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_gate_learns_whom_to_believe_and_keeps_it_on_other_text(hidden):
    told, gold = taking_turns()
    columns = torch.stack([each.gather(-1, gold[:, None])[:, 0] for each in told])
    half = slice(0, 200)
    constant = fit_linear(columns[:, half].numpy())
    start = torch.tensor(constant.weights, dtype=torch.float32)
    gate = fit_gate(columns[:, half], features(told)[half], start, torch.ones(200), hidden=hidden)
    held_out = [each[200:] for each in told]
    assert loss(gate, held_out, gold[200:]) < fit_linear(columns[:, 200:].numpy()).loss - 0.3


def test_a_gate_is_never_worse_than_constant_weights_on_the_text_it_is_fitted_to():
    torch.manual_seed(1)
    told = [torch.randn(60, 9).log_softmax(-1) for _ in range(3)]
    gold = torch.randint(0, 9, (60,))
    columns = torch.stack([each.gather(-1, gold[:, None])[:, 0] for each in told])
    constant = fit_linear(columns.numpy())
    gate = fit_gate(columns, features(told), torch.tensor(constant.weights, dtype=torch.float32), torch.ones(60))
    assert loss(gate, told, gold) <= constant.loss + 1e-3


def test_features_are_entropy_and_highest_log_probability():
    sure, open_ = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
    assert features([sure, open_]).tolist() == pytest.approx([0, 0, math.log(2), -math.log(2)])


def gated(members, gate):
    config = ensemble_of(members).config.to_dict()
    return EnsembleForCausalLM(
        EnsembleConfig(config["members"], "linear", config["weights"], {}, gate.plain()), list(members.values())
    ).eval()


def some_gate(hidden=4):
    torch.manual_seed(2)
    return Gate(2, hidden)


@torch.no_grad()
def test_an_ensemble_with_a_gate_mixes_by_it_at_every_token():
    pair, gate = {"a": llama(), "b": gpt2()}, some_gate()
    ids, _ = prompts(padded=())
    told = [model(input_ids=ids).logits.log_softmax(-1) for model in pair.values()]
    weights = gate(features(told))
    expected = sum(weights[..., i : i + 1] * each.exp() for i, each in enumerate(told))
    assert torch.allclose(gated(pair, gate)(input_ids=ids).logits.exp(), expected, atol=1e-5)


def test_a_gated_ensemble_decodes_by_beams_in_padded_batches_as_without_cache():
    ensemble = gated({"a": llama(), "b": gpt2()}, some_gate())
    ids, mask = prompts()
    found = ensemble.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=8, eos_token_id=None)
    again = ensemble.generate(
        ids, attention_mask=mask, num_beams=3, max_new_tokens=8, eos_token_id=None, use_cache=False
    )
    assert torch.equal(found, again)


@torch.no_grad()
def test_a_gate_is_saved_and_loaded_bit_for_bit(tmp_path):
    ensemble = gated({"a": llama(), "b": gpt2()}, some_gate())
    ensemble.gate.outer.bias.add_(0.5)
    ensemble.save_pretrained(tmp_path / "gated", self_contained=True)
    ids, _ = prompts(padded=())
    loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "gated")
    assert torch.equal(loaded(input_ids=ids).logits, ensemble(input_ids=ids).logits)


def test_with_frozen_members_gradients_reach_the_gate_and_nothing_else():
    pair = {"a": llama().requires_grad_(False), "b": gpt2().requires_grad_(False)}
    ensemble = gated(pair, some_gate())
    ids, _ = prompts(padded=())
    ensemble(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in ensemble.gate.parameters())
    assert all(weight.grad is None for model in pair.values() for weight in model.parameters())


def looking_at_one(skip=0.0, hidden=4, states=False, members=3, seed=6):
    """A gate of three members that sees the second only, with weights that differ much from token to token."""
    torch.manual_seed(seed)
    width = 2 + (16 if states else 0)
    gate = Gate(members, hidden, inputs=width, looks_at=[1], states=states, skip=skip)
    with torch.no_grad():
        gate.outer.weight.mul_(8)
    return gate


def trio():
    return {"a": qwen(), "small": llama(), "b": gpt2()}


def counted(ensemble, calls=False):
    """How many tokens each member reads from now on, or how often it is called."""
    read = dict.fromkeys(range(len(ensemble.members)), 0)
    for place, member in enumerate(ensemble.members):

        def count(_module, _args, given, place=place):
            read[place] += 1 if calls else given["input_ids"].shape[1]

        member.register_forward_pre_hook(count, with_kwargs=True)
    return read


@torch.no_grad()
def step_by_step(ensemble, ids, keep=1):
    """Log-probabilities of every token but the first, each from the cache of those before."""
    cache, told = None, []
    for place in range(ids.shape[1] - 1):
        found = ensemble(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        told.append(found.logits[:, -1])
    return torch.stack(told, 1)


@pytest.mark.parametrize("states", [False, True])
@torch.no_grad()
def test_a_gate_that_looks_at_one_member_mixes_by_what_that_one_says(states):
    members, gate = trio(), looking_at_one(states=states)
    ids, _ = prompts(padded=())
    told = {name: model(input_ids=ids, output_hidden_states=True) for name, model in members.items()}
    log_probs = {name: found.logits.log_softmax(-1) for name, found in told.items()}
    inputs = features([log_probs["small"]], [told["small"].hidden_states[-1]] if states else [])
    expected = sum(gate(inputs)[..., i : i + 1] * each.exp() for i, each in enumerate(log_probs.values()))
    assert torch.allclose(gated(members, gate)(input_ids=ids).logits.exp(), expected, atol=1e-5)


@pytest.mark.parametrize("skip", [0.0, 0.3])
def test_who_is_left_out_reads_what_it_has_missed_and_then_says_the_same(skip):
    ensemble = gated(trio(), looking_at_one(skip, states=True))
    torch.manual_seed(5)
    ids = torch.randint(3, 37, (1, 24))
    running = counted(ensemble)
    stepped, read = step_by_step(ensemble, ids), dict(running)
    given = {"attention_mask": None, "position_ids": None, "logits_to_keep": 0}
    needed = ensemble.told(ids[:, :-1], given, None)[1][0] > 0
    if skip:
        assert (needed.float().mean(0)[[0, 2]] > 0.1).all()
        assert (needed.float().mean(0)[[0, 2]] < 0.9).all()
    # each has read as far as it was needed last
    assert read == {0: 1 + needed[:, 0].nonzero().max(), 1: 23, 2: 1 + needed[:, 2].nonzero().max()}
    assert torch.allclose(stepped, ensemble(input_ids=ids[:, :-1]).logits, atol=1e-5)


def test_a_member_without_any_weight_is_never_run_and_the_rest_are_the_ensemble_of_the_others():
    members, gate = trio(), looking_at_one(hidden=0)
    with torch.no_grad():
        gate.outer.bias[0] = -math.inf
    ensemble = gated(members, gate)
    read = counted(ensemble)
    ids, mask = prompts()
    found = ensemble.generate(ids, attention_mask=mask, max_new_tokens=6, eos_token_id=None)
    assert read == {0: 0, 1: 12, 2: 12}
    others = Gate(2, 0, inputs=2, looks_at=[0])
    with torch.no_grad():
        others.outer.weight.copy_(gate.outer.weight[1:])
        others.outer.bias.copy_(gate.outer.bias[1:])
    rest = gated({name: model for name, model in members.items() if name != "a"}, others)
    assert torch.equal(found, rest.generate(ids, attention_mask=mask, max_new_tokens=6, eos_token_id=None))
    given = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(ensemble(**given).logits[mask.bool()], rest(**given).logits[mask.bool()])


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}, {}])
def test_decoding_with_members_left_out_is_decoding_without_a_cache(way):
    ensemble = gated(trio(), looking_at_one(0.3, states=True))
    ids, mask = prompts(1, 9, ()) if "prompt_lookup_num_tokens" in way else prompts()
    plain = {k: v for k, v in way.items() if k != "prompt_lookup_num_tokens"}
    given = {"attention_mask": mask, "max_new_tokens": 10, "eos_token_id": None}
    run = counted(ensemble, calls=True)
    torch.manual_seed(3)
    found = ensemble.generate(ids, **given, **way)
    assert min(run[0], run[2]) < run[1] == max(run.values())
    torch.manual_seed(3)
    assert torch.equal(found, ensemble.generate(ids, use_cache=False, **given, **plain))


def test_a_static_cache_keeps_the_text_as_well():
    ensemble = gated(trio(), looking_at_one(0.3, states=True))
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": 10, "eos_token_id": None}
    found = ensemble.generate(ids, cache_implementation="static", disable_compile=True, **given)
    assert torch.equal(found, ensemble.generate(ids, **given))


def test_an_ensemble_that_leaves_members_out_may_be_a_member():
    inner = gated(trio(), looking_at_one(0.3, states=True))
    outer = ensemble_of({"inner": inner, "other": llama(9)}, [0.6, 0.4])
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None, "num_beams": 2}
    assert torch.equal(outer.generate(ids, **given), outer.generate(ids, use_cache=False, **given))


def test_speculation_draws_from_the_same_mixture():
    ensemble = gated(trio(), looking_at_one(0.3, states=True))
    ids, _ = prompts(1, 7, ())
    found = ensemble.speculate(ids, draft="small", max_new_tokens=10).sequences
    assert torch.equal(found, ensemble.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None))


def test_a_gate_saves_what_it_looks_at(tmp_path):
    ensemble = gated(trio(), looking_at_one(0.3, states=True))
    ensemble.save_pretrained(tmp_path / "gated", self_contained=True)
    loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "gated")
    ids, _ = prompts(padded=())
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, ensemble(input_ids=ids).logits)
    assert (loaded.gate.skip, loaded.gate.skips) == (0.3, True)


def test_a_gate_that_could_leave_out_everybody_is_refused():
    with pytest.raises(RequestError, match=r"`skip` from 0 to below 0\.333"):
        Gate(3, skip=0.4)


def test_hidden_states_tell_a_gate_what_entropy_does_not():
    """Both members are equally sure everywhere; only the state says who is right."""
    generator = torch.Generator().manual_seed(1)
    tokens = 300
    gold = torch.randint(0, 9, (tokens,), generator=generator)
    knows = torch.rand(tokens, generator=generator) < 0.5
    told = []
    for member in range(2):
        scores = torch.zeros(tokens, 9)
        right = knows if member == 0 else ~knows
        scores[torch.arange(tokens), torch.where(right, gold, (gold + 1) % 9)] = 3
        told.append(scores.log_softmax(-1))
    state = torch.stack([knows.float(), torch.randn(tokens, generator=generator)], -1)
    columns = torch.stack([each.gather(-1, gold[:, None])[:, 0] for each in told])
    half, start = slice(0, 150), torch.full((2,), 0.5)
    plain = fit_gate(columns[:, half], features(told)[half], start, torch.ones(150))
    seeing = fit_gate(columns[:, half], features(told, [state])[half], start, torch.ones(150), states=True)

    def held_out(gate, inputs):
        mixed = linear.combine(list(columns[:, 150:, None]), gate(inputs[150:]), linear.Settings())
        return -mixed.mean().item()

    assert held_out(seeing, features(told, [state])) < held_out(plain, features(told)) - 0.3


@pytest.mark.parametrize("help_", ["chunks", "returned cache", "assistant", "as assistant"])
def test_members_that_are_left_out_catch_up_however_the_text_is_read(help_):
    ensemble = gated(trio(), looking_at_one(0.3, states=True))
    ids, _ = prompts(1, 9, ())
    given = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None}
    expected = ensemble.generate(ids, use_cache=False, **given)
    if help_ == "chunks":
        found = ensemble.generate(ids, prefill_chunk_size=4, **given)
    elif help_ == "assistant":
        found = ensemble.generate(ids, assistant_model=llama(), **given)
    elif help_ == "as assistant":
        model = qwen(7)
        found, expected = model.generate(ids, assistant_model=ensemble, **given), model.generate(ids, **given)
    else:
        first = ensemble.generate(ids, return_dict_in_generate=True, **{**given, "max_new_tokens": 4})
        rest = {**given, "max_new_tokens": 5}
        found = ensemble.generate(first.sequences, past_key_values=first.past_key_values, **rest)
    assert torch.equal(found, expected)
