"""RegMean and RegMean++ against their twins, on models that have learned something."""

import json
import shutil

import data_twins as twins
import numpy as np
import pytest
import readers
import torch
from readers import KINDS, ON, mean, save, text_rows
from safetensors.torch import load_file, save_file
from small_family import tensors
from transformers import GPT2Config, GPT2LMHeadModel

import graft.merge._grams as grams
from graft import models
from graft.merge._layers import Layers
from graft.merge.regmean import regression_mean


def test_the_regression_is_its_formula():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(3, 5, 4))
    inputs = [draw.normal(size=(20, 4)) for _ in range(3)]
    found = [twins.gram(x) for x in inputs]
    made = regression_mean(*([torch.tensor(x).float() for x in each] for each in (values, found)), [1, 2, 0.5], 0.7)
    np.testing.assert_allclose(made.numpy(), twins.regmean(values, found, [1, 2, 0.5], 0.7), rtol=1e-4, atol=1e-5)


def test_gram_matrices_that_are_alike_and_diagonal_give_the_weighted_mean():
    values = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    made = regression_mean(values, [torch.eye(4)] * 2, [1, 3], 1.0)
    torch.testing.assert_close(made, (values[0] + 3 * values[1]) / 4, rtol=1e-5, atol=1e-6)


def test_equal_models_come_back_whatever_their_inputs_and_dead_inputs_keep_the_mean():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(5, 4, generator=draw), torch.randn(5, 4, generator=draw)
    x, y = torch.randn(9, 4, generator=draw), torch.randn(2, 4, generator=draw)
    found = [x.T @ x, y.T @ y]
    torch.testing.assert_close(regression_mean([one, one], found, [1, 1], 1.0), one, rtol=1e-5, atol=1e-5)
    for gram in found:
        gram[2], gram[:, 2] = 0, 0
    made = regression_mean([one, other], found, [1, 1], 0.9)
    torch.testing.assert_close(made[:, 2], (one[:, 2] + other[:, 2]) / 2, rtol=1e-5, atol=1e-6)


def linear_layers():
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return [f"model.layers.{i}.{part}" for i in range(2) for part in parts]


@pytest.mark.parametrize("budget", [2 << 30, 4 * 24 * 24 * 3])
def test_regmean_is_its_formula_however_many_passes_it_takes(budget, merged, tuned, monkeypatch):
    monkeypatch.setattr(grams, "BUDGET", budget)
    made, notes, folder = merged({"method": "regmean", "on": ON, "models": {"low": 1, "middle": 2, "high": 1}})
    assert notes["merged_by_regression"] == 15
    passes = len(list((folder.parent / "out.scratch" / "grams").iterdir())) / 3
    assert passes == 1 if budget > 10**6 else passes > 4
    loaded = [models.load(tuned[kind], dtype=torch.float32) for kind in KINDS]
    for layer in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        found = [twins.gram(twins.inputs_of(m, layer, text_rows(k))) for m, k in zip(loaded, KINDS, strict=True)]
        values = [m.get_submodule(layer).weight.detach().double().numpy() for m in loaded]
        expected = twins.regmean(values, found, [1, 2, 1], 0.9)
        np.testing.assert_allclose(made[f"{layer}.weight"].numpy(), expected, rtol=1e-2, atol=2e-3, err_msg=layer)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        values = [tensors(tuned[kind])[name].double().numpy() for kind in KINDS]
        np.testing.assert_allclose(made[name], (values[0] + 2 * values[1] + values[2]) / 4, rtol=1e-5, atol=1e-6)


def test_layers_that_get_the_same_input_share_a_gram_matrix(merged):
    _, _, folder = merged({"method": "regmean", "on": ON})
    part = folder.parent / "out.scratch" / "grams" / "0-0"
    places = {name: leader for name, (leader, _) in json.loads((part / "grams.json").read_text()).items()}
    assert len(load_file(part / "model.safetensors")) == 9
    assert {places[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkv"} == {
        "model.layers.0.self_attn.q_proj.weight"
    }


def test_padding_is_no_input():
    gatherer = grams.Gatherer(mask=torch.tensor([[True, True, False]]))
    x = torch.randn(1, 3, 4)
    gatherer.add("a", x)
    gatherer.add("b", x)
    gatherer.add("c", x[0, :1])
    torch.testing.assert_close(gatherer.means()["a"], x[0, :2].T @ x[0, :2] / 2)
    torch.testing.assert_close(gatherer.means()["c"], x[0, :1].T @ x[0, :1])
    assert gatherer.shared == {"a": "a", "b": "a", "c": "c"}


def test_regmean_fits_the_outputs_of_every_model_on_held_out_text_better_than_the_mean(merged, tuned):
    """Gram matrices from eight of the twelve texts of a kind, the objective on the other four."""
    made, _, _ = merged({"method": "regmean", "on": {kind: f"{kind}-most" for kind in KINDS}})
    plain, _, _ = merged({"method": "linear", "length": None}, "mean")
    loaded = [models.load(tuned[kind], dtype=torch.float32) for kind in KINDS]
    better = 0
    for layer in linear_layers():
        off = {"made": 0.0, "plain": 0.0}
        for model, kind in zip(loaded, KINDS, strict=True):
            x = twins.inputs_of(model, layer, text_rows(kind)[8:])
            own = model.get_submodule(layer).weight.detach().double().numpy()
            for name, found in (("made", made), ("plain", plain)):
                off[name] += np.sum((x @ (found[f"{layer}.weight"].double().numpy() - own).T) ** 2) / len(x)
        better += off["made"] < off["plain"]
    assert better == len(linear_layers())


def gpt2_family(folder, **config):
    """GPT-2: layers kept as [in, out], and an output matrix that is the embedding."""
    made_of = {}
    for seed, kind in enumerate(KINDS):
        torch.manual_seed(0)
        made = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=32, n_embd=8, n_layer=2, n_head=2, **config))
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for weight in made.parameters():
                weight.add_(0.01 * torch.randn_like(weight))
        made_of[kind] = save(made.eval(), folder / kind)
    return made_of


def test_layers_kept_the_other_way_round_and_tied_matrices_are_understood(merged, tmp_path):
    own = gpt2_family(tmp_path)
    made, notes, _ = merged({"method": "regmean", "on": ON}, own=own)
    assert notes["merged_by_regression"] == 8
    loaded = [models.load(own[kind], dtype=torch.float32) for kind in KINDS]
    for layer in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        found = [twins.gram(twins.inputs_of(m, layer, text_rows(k))) for m, k in zip(loaded, KINDS, strict=True)]
        values = [m.get_submodule(layer).weight.detach().double().numpy().T for m in loaded]
        expected = twins.regmean(values, found, [1, 1, 1], 0.9).T
        np.testing.assert_allclose(made[f"{layer}.weight"].numpy(), expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(
        made["transformer.wte.weight"], mean(own, "transformer.wte.weight"), rtol=1e-5, atol=1e-6
    )
    fishers, _, _ = merged({"method": "fisher", "on": ON}, "fisher", own=own)
    assert fishers.keys() == made.keys()


def test_tensors_named_without_the_models_prefix_are_found(merged, tmp_path):
    own = gpt2_family(tmp_path)
    expected, _, _ = merged({"method": "regmean", "on": ON}, "expected", own=own)
    for folder in own.values():
        short = {name.removeprefix("transformer."): t for name, t in tensors(folder).items()}
        save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    for method in ("regmean", "fisher"):
        made, _, _ = merged({"method": method, "on": ON}, method, own=own)
        assert all(not name.startswith("transformer.") for name in made)
    made = tensors(tmp_path / "regmean")
    assert all(torch.equal(made[name.removeprefix("transformer.")], value) for name, value in expected.items())


def test_regmean_plus_is_its_formula(merged, tuned):
    made, _, _ = merged({"method": "regmean_plus", "on": ON, "models": {"low": 1, "middle": 2, "high": 1}})
    loaded = [models.load(tuned[kind], dtype=torch.float32) for kind in KINDS]
    layers = [(f"model.layers.{i}.", [n for n in linear_layers() if f".{i}." in n]) for i in range(2)]
    expected = twins.regmean_plus(
        loaded, [text_rows(kind) for kind in KINDS], [1, 2, 1], 0.9, [*layers, ("", ["lm_head"])]
    )
    assert made.keys() == tensors(tuned["low"]).keys()
    for name, value in made.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=2e-2, atol=5e-3, err_msg=name)


def test_the_first_layer_sees_what_regmean_shows_it_where_the_embeddings_are_equal(merged, tuned, tmp_path):
    own = {name: shutil.copytree(folder, tmp_path / name) for name, folder in tuned.items()}
    for kind in KINDS:
        changed = tensors(own[kind]) | {
            "model.embed_tokens.weight": tensors(tuned["base"])["model.embed_tokens.weight"]
        }
        save_file(changed, own[kind] / "model.safetensors", metadata={"format": "pt"})
    plain, _, _ = merged({"method": "regmean", "on": ON}, "plain", own=own)
    made, _, _ = merged({"method": "regmean_plus", "on": ON}, "made", own=own)
    first = [name for name in made if "layers.0." in name]
    assert all(torch.allclose(made[name], plain[name], atol=1e-5) for name in first)
    assert not torch.allclose(*(out["model.layers.1.mlp.up_proj.weight"] for out in (made, plain)), atol=1e-5)


def test_an_output_matrix_that_is_tied_counts_as_embedding():
    assert Layers.of(readers.model(tie_word_embeddings=True)).transposed("lm_head.weight") is None
    assert Layers.of(readers.model()).transposed("lm_head.weight") is False


def test_few_inputs_are_fitted_and_leave_the_rest_as_the_mean_has_it():
    draw = torch.Generator().manual_seed(1)
    one, other = torch.randn(5, 8, generator=draw), torch.randn(5, 8, generator=draw)
    x, y = torch.randn(2, 8, generator=draw), torch.randn(3, 8, generator=draw)
    made = regression_mean([one, other], [x.T @ x, y.T @ y], [1, 1], 1.0)
    assert float(((made - one) @ x.T).abs().max()) < 0.05
    assert float(((made - other) @ y.T).abs().max()) < 0.05
    # the pull towards the mean is as strong as the inputs are
    free = torch.linalg.svd(torch.cat([x, y])).Vh[5:] * (x.T @ x + y.T @ y).diagonal()
    torch.testing.assert_close(made @ free.T, (one + other) @ free.T / 2, rtol=0.01, atol=0.01)
