"""Weights that follow the context: fitted, saved, decoded; gradients flow into the gate and nowhere else."""

import math

import pytest
import torch
from tiny_members import gpt2, llama, prompts

from graft.ensemble import linear
from graft.ensemble.gate import Gate, features, fit_gate
from graft.ensemble.model import EnsembleConfig, EnsembleForCausalLM, ensemble_of
from graft.ensemble.weights import fit_linear


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
