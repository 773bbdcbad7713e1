"""What memory is said to be needed: the published figures, and what autograd really keeps."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graft.adapters import adopt
from graft.methods import method
from graft.settings import parse
from graft.train.cross_entropy import summed_cross_entropy
from graft.train.deferred import loss_of_logits
from graft.train.estimate import training_estimate
from graft.train.memory import (
    CONVENTIONS,
    NF4_BYTES,
    PROCESS,
    Dimensions,
    activation_bytes,
    model_states,
    positions_at_once,
)
from graft.train.parallel import TOGETHER
from graft.train.settings import TrainSettings
from graft.tune import kept_by

G = 1e9


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_figures_of_zero_for_7_5_billion_parameters_on_64_devices(stage, gigabytes):
    """Rajbhandari et al. 2020, figure 1."""
    states = model_states(7.5e9, CONVENTIONS["mixed"], stage=stage, devices=64)
    assert states.total / G == pytest.approx(gigabytes, abs=0.05)


def test_65_billion_parameters_in_16_bits_take_over_a_terabyte():
    least = model_states(65e9, CONVENTIONS["mixed"]).total
    most = model_states(65e9, CONVENTIONS["mixed, fp32 gradients"]).total
    assert 1000 < least / G < most / G < 1400


def test_65_billion_parameters_in_nf4_with_adapters_fit_into_48_gigabytes():
    """QLoRA's setting: rank 64 on all linear layers of LLaMA-65B, 16-bit adapters, batch 1, checkpointed layers."""
    width, hidden, layers, rank = 8192, 22016, 80, 64
    adapters = layers * rank * (4 * 2 * width + 3 * (width + hidden))
    states = model_states(65.2e9 + adapters, CONVENTIONS["8-bit optimizer"], trained=adapters, frozen_bytes=NF4_BYTES)
    known = Dimensions(width, layers, hidden, 4, width, True, 32000)
    assert (states.total + activation_bytes(known, 512, half=True, checkpointing=True)) / G < 48
    assert model_states(65.2e9, CONVENTIONS["mixed"]).total / G > 1000


MODELS = {
    "llama": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
    "mistral": {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "opt": {"hidden_size": 64, "ffn_dim": 256, "num_attention_heads": 4, "dropout": 0.0, "word_embed_proj_dim": 64},
}


def kept_by_autograd(model, ids, half):
    """Bytes of all storages that backward needs, weights and their casts apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    casts = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    found, held = {}, []

    def keep(tensor):
        held.append(tensor)
        storage = tensor.untyped_storage()
        cast = half and tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in casts
        if storage.data_ptr() not in weights and not cast:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        loss_of_logits(model, {"input_ids": ids, "use_cache": False}, lambda z: summed_cross_entropy(z, ids))
    # and, while the loss is computed, the logits and log-probabilities of one chunk
    return sum(found.values()) + 8 * model.config.vocab_size * min(ids.numel(), positions_at_once(300))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_activations_are_within_15_percent_of_what_autograd_keeps(kind, half):
    layers = {"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4}
    config = AutoConfig.for_model(kind, vocab_size=300, **MODELS[kind], **layers)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(3, 300, (3, 41))
    said = activation_bytes(Dimensions.of(config.to_dict()), ids.numel(), half=half)
    assert said == pytest.approx(kept_by_autograd(model, ids, half), rel=0.15)


@pytest.mark.parametrize("how", ["lora", "parallel_adapter", "houlsby", "prefix", "ia3", "bitfit"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_activations_below_adapters_are_within_15_percent_of_what_autograd_keeps(kind, how):
    """Of a model deep enough that the first block, which keeps less, is a small part of it."""
    layers = {"n_layer": 8} if kind == "gpt2" else {"num_hidden_layers": 8}
    more = {"attention_bias": True} if how == "bitfit" and kind == "llama" else {}
    config = AutoConfig.for_model(kind, vocab_size=300, **MODELS[kind], **layers, **more)
    if how == "bitfit" and kind == "mistral":
        pytest.skip("it has no biases")
    model = AutoModelForCausalLM.from_config(config).train()
    chosen = method("graft.tune", how)
    sizes = {"lora": {"rank": 4}, "parallel_adapter": {"width": 4}, "houlsby": {"width": 4}, "prefix": {"length": 2}}
    points = chosen.points(chosen.Settings(**sizes.get(how, {})))
    adopt(model, points)
    ids, known = torch.randint(3, 300, (3, 41)), Dimensions.of(config.to_dict())
    said = activation_bytes(known, ids.numel(), reads=kept_by(points, known))
    assert said == pytest.approx(kept_by_autograd(model, ids, False), rel=0.15)


def test_checkpointing_keeps_an_input_a_layer_and_one_layer():
    known = Dimensions(64, 10, 256, 4, 64, True)
    plain, less = activation_bytes(known, 100), activation_bytes(known, 100, checkpointing=True)
    layer = (plain - 100 * 4 * 4 * 64) / 10
    assert less == pytest.approx(100 * 4 * 64 * (10 + 3) + layer)


def test_what_the_loss_has_beside_it_does_not_grow_with_whole_logits():
    known, inputs = Dimensions(64, 10, 256, 4, 64, True, 50_000), 100_000 * 4 * 64
    weight, chunk = 4 * 50_000 * 64, 8 * 50_000 * positions_at_once(50_000)
    assert positions_at_once(50_000) == 256
    few, whole = (activation_bytes(known, 100_000, reads=0, whole=one) for one in (False, True))
    assert whole - few == pytest.approx(100_000 * 2 * 4 * 50_000 - chunk - inputs)
    assert activation_bytes(known, 100_000) - activation_bytes(known, 100_000, whole=True) == pytest.approx(
        weight + chunk + inputs - 100_000 * 2 * 4 * 50_000
    )
    assert activation_bytes(known, 10, reads=0) < 10 * (8 * 50_000 + 4 * 64 * 200)


@pytest.mark.parametrize(
    "given", [{"compile": True}, {"parallel": {"tensor": 2}}, {"parallel": {"method": "zero", "stage": 3}}]
)
def test_a_model_whose_output_layer_is_not_for_the_loss_to_compute_has_whole_logits(monkeypatch, given):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    known = Dimensions(64, 2, 256, 4, 64, True, 100_000)

    def said(**more):
        settings = parse(TrainSettings, {"budget": "2 steps", "batch_size": 8, **more})
        return training_estimate(10**7, settings, 512, known).memory_bytes

    assert said(**given) - said() > 8 * 512 * 8 * 100_000 / 2


def test_a_configuration_that_says_too_little_gives_no_dimensions():
    assert Dimensions.of({"model_type": "mystery"}) is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_the_weights_of_a_block_are_counted(kind):
    layers = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    one, two = (AutoConfig.for_model(kind, vocab_size=300, **MODELS[kind], **{layers: n}) for n in (1, 2))
    with torch.device("meta"):
        sizes = [AutoModelForCausalLM.from_config(config).num_parameters() for config in (one, two)]
    assert Dimensions.of(one.to_dict()).block == pytest.approx(sizes[1] - sizes[0], rel=0.03)  # norms and biases


def test_packed_weights_stay_whole_where_the_rest_is_spread():
    plain = {"trained": 10**6, "frozen_bytes": 0.6}
    whole, spread, packed = (
        model_states(10**9 + 10**6, CONVENTIONS["fp32"], **plain, **more)
        for more in ({}, {"stage": 3, "devices": 4}, {"stage": 3, "devices": 4, "packed": True})
    )
    assert spread.weights == pytest.approx(whole.weights / 4)
    assert packed.weights == pytest.approx(0.6 * 10**9 + 10**6)
    assert packed.gradients == spread.gradients == 10**6


def test_the_plan_of_spread_trainings_counts_what_is_packed_and_what_is_offloaded():
    known = Dimensions(512, 8, 1365, 4, 512, True, 8000)

    def said(frozen_bytes, **parallel):
        settings = parse(TrainSettings, {"budget": "2 steps", "batch_size": 8, "parallel": parallel})
        return training_estimate(33 * 10**6, settings, 64, known, 10**6, frozen_bytes=frozen_bytes).memory_bytes

    plain, packed = said(4.0, method="fsdp", devices=4), said(0.9, method="fsdp", devices=4)
    alone = said(0.9, method="ddp", devices=4)
    assert packed - plain < 0.9 * 33e6 - 4 * 33e6 / 4 + 2e6  # whole, but smaller than a quarter of plain ones
    assert alone - packed == pytest.approx(12 * 10**6 * 3 / 4 - 4 * (33e6 - 8 * known.block), rel=0.05)
    # offloaded, only what is packed stays on the device of a model that is not computing
    assert said(0.9, method="fsdp", devices=4, offload="cpu") < packed


def test_the_plan_of_zero_counts_deepspeeds_own_copy_of_the_weights_and_its_rooms(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())

    def said(stage, *, trained=None, **more):
        parallel = {"method": "zero", "stage": stage, "devices": 4, **more}
        settings = parse(TrainSettings, {"budget": "2 steps", "batch_size": 8, "parallel": parallel})
        return training_estimate(10**9, settings, 1, Dimensions(2048, 20, 5461, 4, 2048, True, 8), trained).memory_bytes

    # with hardly a token, gradients and the room they are sent in are more than activations
    room, billion = 4 * TOGETHER, 10**9
    states = {1: 4 + (8 + 4) / 4 + 4, 2: 4 + (8 + 4) / 4 + 4 / 4, 3: (4 + 8 + 4 + 4) / 4}
    for stage, bytes_each in states.items():
        rooms = 2 * room if stage == 3 else room
        assert said(stage) - PROCESS == pytest.approx(bytes_each * billion + rooms, rel=0.01)
    assert said(2, offload="cpu") - PROCESS == pytest.approx(4 * billion + room, rel=0.01)
    assert said(2, trained=10**6) - PROCESS == pytest.approx(4 * billion + room + 8 * 10**6, rel=0.01)
