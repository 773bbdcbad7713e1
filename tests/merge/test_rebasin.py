"""Git Re-Basin: what may change places changes nothing, and shuffled models are put back in order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import trained_family
from small_adapters import adapter, folded
from small_family import family, merge, model, save, with_nan
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import graft
import graft.merge
from graft.checkpoint import TensorReader
from graft.errors import CannotCombine, CheckpointError, SettingsError
from graft.evaluate.judge import Judge
from graft.merge.barrier import Line
from graft.merge.matching import Matching, write_aligned
from graft.merge.symmetry import symmetries
from graft.verb import Job

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODERS = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 24},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 24, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 6},
    "olmo2": {"num_key_value_heads": 4, "intermediate_size": 24},
    "mistral": {"num_key_value_heads": 1, "intermediate_size": 24},
    "gemma2": {"num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 4},
    "phi3": {"num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "intermediate_size": 24,
    },
    "bert": {"intermediate_size": 24, "max_position_embeddings": 32},
    "roberta": {"intermediate_size": 24, "max_position_embeddings": 34, "pad_token_id": 1},
}
SHAPE_NAMES = {"gpt2": ("n_embd", "n_layer", "n_head"), "gptj": ("n_embd", "n_layer", "n_head")}


def made(kind, seed=0, **more):
    torch.manual_seed(seed)
    given = {**SMALL, **DECODERS[kind], **more}
    if kind in ("gpt2", "gptj"):
        given = {k: v for k, v in given.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    if kind == "gpt_neo":
        given = {k: v for k, v in given.items() if k not in ("num_hidden_layers", "num_attention_heads")}
    config = AutoConfig.for_model(kind, **given)
    found = (AutoModelForMaskedLM if kind in ("bert", "roberta") else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return found.eval()


def shuffled(matching, seed=0):
    """Orders drawn at random, of every kind of unit: heads with their channels, groups with their heads."""
    draw = np.random.default_rng(seed)
    orders, heads = dict(matching.orders), matching.known.heads
    for unit, order in orders.items():
        if unit.rpartition(":")[2] not in "qkvo" or ":" not in unit:
            orders[unit] = draw.permutation(len(order))
    for layer in matching.known.layers:
        parts = {kind: [] for kind in "qkvo"}
        for group in draw.permutation(heads.groups):
            channels, plain = draw.permutation(heads.size), np.arange(heads.size)
            parts["k"].append(group * heads.size + plain)
            parts["v"].append(group * heads.size + channels)
            for head in group * heads.each + draw.permutation(heads.each):
                parts["q"].append(head * heads.size + plain)
                parts["o"].append(head * heads.size + channels)
        orders |= {f"{layer}:{kind}": np.concatenate(found) for kind, found in parts.items()}
    return orders


@pytest.mark.parametrize("kind", DECODERS)
def test_another_order_of_all_units_computes_the_same_and_is_found_again(kind, tmp_path):
    before = made(kind)
    before.save_pretrained(tmp_path / "a")
    known = symmetries(tmp_path / "a")
    with TensorReader(tmp_path / "a") as a:
        start = Matching(known, a, a)
        write_aligned(a, known, shuffled(start), tmp_path / "b")
        before.config.save_pretrained(tmp_path / "b")
    after = type(before).from_pretrained(tmp_path / "b").eval()
    assert not torch.equal(next(iter(after.parameters())), next(iter(before.parameters()))), (
        "the shuffle moved nothing: the test would show nothing"
    )
    ids = torch.randint(2, 40, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(after(input_ids=ids).logits, before(input_ids=ids).logits, atol=2e-5, rtol=1e-4)
    with TensorReader(tmp_path / "a") as a, TensorReader(tmp_path / "b") as b:
        matching = Matching(known, a, b)
        reached = matching.search(20)
    assert reached[0] < 0.97
    assert reached[-1] == pytest.approx(1, abs=1e-6)


def test_no_order_of_the_hidden_units_agrees_better_by_brute_force(tmp_path):
    """Four hidden units, everything else held: all 24 orders are tried."""
    for seed, name in enumerate("ab"):
        made("llama", seed, intermediate_size=4, num_hidden_layers=1).save_pretrained(tmp_path / name)
    known = symmetries(tmp_path / "a")
    with TensorReader(tmp_path / "a") as a, TensorReader(tmp_path / "b") as b:
        matching = Matching(known, a, b)
        (unit,) = (unit for unit in matching.orders if unit.endswith(":mlp"))
        found = {}
        for order in itertools.permutations(range(4)):
            matching.orders[unit] = np.array(order)
            found[order] = matching.agreement()
        matching._match_units(unit, matching.names)
    assert tuple(matching.orders[unit]) == max(found, key=found.get)


def test_agreement_never_falls(tmp_path):
    for seed, name in enumerate("ab"):
        made("llama", seed).save_pretrained(tmp_path / name)
    known = symmetries(tmp_path / "a")
    with TensorReader(tmp_path / "a") as a, TensorReader(tmp_path / "b") as b:
        reached = Matching(known, a, b).search(10)
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(reached))
    assert reached[-1] > reached[0] + 0.05


def test_what_no_order_changes_is_not_read_again(tmp_path, monkeypatch):
    """Squares are read once, the agreement with itself once; the round that finds nothing new reads nothing at all."""
    made("llama").save_pretrained(tmp_path / "a")
    known, read = symmetries(tmp_path / "a"), []
    values = graft.merge.matching._values
    monkeypatch.setattr(graft.merge.matching, "_values", lambda reader, name: read.append(name) or values(reader, name))
    with TensorReader(tmp_path / "a") as a:
        matching = Matching(known, a, a)
        assert matching.agreement() == pytest.approx(1)
        assert len(read) == 4 * len(matching.names)
        matching.search(1)
        read.clear()
        assert matching.search(3)[-1] == pytest.approx(1)
        assert read == []
        matching.orders["model.layers.0:mlp"] = matching.orders["model.layers.0:mlp"][::-1].copy()
        assert matching.agreement() < 0.99
        assert sorted(read) == sorted(2 * [f"model.layers.0.mlp.{part}_proj.weight" for part in ("down", "gate", "up")])


def test_what_is_remembered_is_what_is_found_anew(tmp_path):
    for seed, name in enumerate("ab"):
        made("qwen3", seed).save_pretrained(tmp_path / name)
    known = symmetries(tmp_path / "a")
    with TensorReader(tmp_path / "a") as a, TensorReader(tmp_path / "b") as b:
        matching = Matching(known, a, b)
        reached = matching.search(10)
        fresh = Matching(known, a, b)
        fresh.orders = matching.orders
        assert fresh.agreement() == pytest.approx(reached[-1], abs=1e-12)
        before = dict(fresh.orders)
        fresh.search(1)
        assert all(np.array_equal(before[unit], order) for unit, order in fresh.orders.items())


def test_a_model_and_its_shuffle_merge_into_the_model(tmp_path):
    first = model(0)
    folders = {"a": save(first, tmp_path / "a"), "b": save(model(0), tmp_path / "b")}
    known = symmetries(folders["a"])
    with TensorReader(folders["a"]) as a:
        write_aligned(a, known, shuffled(Matching(known, a, a)), folders["b"])
    tensors, told = merge({"method": "rebasin", "models": ["a", "b"]}, folders, tmp_path / "out")
    alignment = told["notes"]["alignment"]["models"]["b"]
    assert alignment["cosine_before"] < 0.97
    assert alignment["cosine_after"] == 1
    for name, value in first.state_dict().items():
        if name in tensors:
            torch.testing.assert_close(tensors[name], value)


def test_models_of_one_order_merge_as_their_mean(tmp_path):
    folders = family(tmp_path, 2)
    del folders["base"]
    aligned, _ = merge({"method": "rebasin", "models": {"a": 1, "b": 3}}, folders, tmp_path / "aligned")
    plain, _ = merge({"method": "linear", "models": {"a": 1, "b": 3}}, folders, tmp_path / "plain")
    assert all(torch.equal(aligned[name], plain[name]) for name in plain)


def test_a_parent_with_nan_is_named_with_the_tensor(tmp_path):
    folders = family(tmp_path, 1)
    folders["sick"] = with_nan(folders["a"], tmp_path / "sick", "layers.1.mlp.up_proj.weight")
    for models in (["base", "sick"], ["sick", "base"]):
        with pytest.raises(CheckpointError, match=r"sick: NaN or Inf in model.layers.1.mlp.up_proj.weight \(.*sick"):
            merge({"method": "rebasin", "models": models}, folders, tmp_path / "out")


def test_several_vocabularies_are_refused_before_work():
    with pytest.raises(SettingsError, match=r"expected no `vocabulary` beside rebasin.*an ensemble"):
        graft.merge.VERB.parse({"method": "rebasin", "models": ["a", "b"], "vocabulary": "union"})


@pytest.mark.parametrize("order", [["a", "x"], ["x", "a"]])
def test_an_adapter_is_aligned_as_the_model_that_it_makes(order, tmp_path):
    folders = family(tmp_path, 1)
    folders["x"] = adapter(folders["base"], tmp_path / "x", 1)
    found, _ = merge({"method": "rebasin", "models": order}, folders, tmp_path / "out")
    plain = model(0)
    plain.load_state_dict(folded(folders["base"], folders["x"]))
    stand_in = folders | {"x": save(plain, tmp_path / "folded")}
    wanted, _ = merge({"method": "rebasin", "models": order}, stand_in, tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_an_output_matrix_that_an_adapter_unties_is_aligned_too(tmp_path):
    folders = {"base": save(model(0, tie_word_embeddings=True), tmp_path / "base")}
    folders["x"] = adapter(folders["base"], tmp_path / "x", target_modules=["lm_head"])
    found, _ = merge({"method": "rebasin", "models": ["base", "x"]}, folders, tmp_path / "out")
    wanted, _ = merge({"method": "linear", "models": ["base", "x"]}, folders, tmp_path / "wanted")
    assert found.keys() == wanted.keys() >= {"lm_head.weight"}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Two models of different initialisation, trained on the same text until they know it."""
    root = tmp_path_factory.mktemp("strangers")
    data = trained_family.write_data(root)
    folders = {}
    for seed, name in enumerate("ab"):
        fresh = trained_family.model()
        torch.manual_seed(100 + seed)
        fresh.apply(fresh._init_weights)
        lines = [text for kind in trained_family.KINDS for text in trained_family.texts(kind)]
        folders[name] = trained_family.save(trained_family.train(fresh, lines, 60, 5e-3, seed), root / name)
    return root, data, folders


def test_the_line_between_strangers_is_less_of_a_hill_once_they_are_in_one_order(strangers, tmp_path):
    root, data, folders = strangers
    settings = {"method": "rebasin", "models": ["a", "b"], "on": "all.dev", "points": 5}
    parsed = graft.merge.VERB.parse(settings)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    scratch.mkdir()
    job = Job("out", parsed, 0, out, scratch, scratch, folders, data, root)
    told = graft.merge.VERB.run(job)["notes"]["alignment"]["models"]["b"]
    assert told["cosine_after"] > told["cosine_before"]
    assert told["line_before"][0] == told["line_after"][0]
    assert told["line_after"][-1] == pytest.approx(told["line_before"][-1], rel=1e-4)
    assert 0 < told["barrier_after"] < told["barrier_before"]
    # the middle of the line is the merge that was written
    judge = Judge.of(parsed.entry(), data, root)
    merged = judge.value(graft.load(out), trained_family.tokenizer())
    assert merged == pytest.approx(told["line_after"][2], rel=1e-4)


def test_a_barrier_is_the_height_above_the_straight_line_between_the_ends():
    assert Line([0, 0.5, 1], [1.0, 4.0, 3.0]).barrier == 2
    assert Line([0, 0.5, 1], [1.0, 0.5, 3.0]).barrier == 0
    assert Line([0, 0.5, 1], [0.9, 0.2, 0.7], higher_is_better=True).barrier == pytest.approx(0.6)
    assert Line([0, 0.5, 1], [1.0, None, 3.0]).barrier is None


def test_strangers_are_refused_by_other_methods_and_not_by_this_one(strangers, tmp_path):
    _, _, folders = strangers
    with pytest.raises(CannotCombine, match="grew from different initialisations"):
        merge({"method": "linear", "models": ["a", "b"]}, folders, tmp_path / "plain")
    _, told = merge({"method": "rebasin", "models": ["a", "b"]}, folders, tmp_path / "aligned")
    assert told["forced"] == []


def test_an_aligned_model_is_not_aligned_again_after_a_kill(strangers, tmp_path, monkeypatch):
    _, _, folders = strangers
    first, _ = merge({"method": "rebasin", "models": ["a", "b"]}, folders, tmp_path / "out")
    monkeypatch.setattr(Matching, "search", lambda *_: pytest.fail("searched again"))
    again, _ = merge({"method": "rebasin", "models": ["a", "b"]}, folders, tmp_path / "out")
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_an_architecture_that_cannot_be_read_is_refused_by_name(tmp_path):
    config = AutoConfig.for_model(
        "mixtral", **SMALL, intermediate_size=24, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CannotCombine, match=r"known names, found model\.layers\.0\.mlp"):
        symmetries(tmp_path)


def test_a_model_without_attention_is_refused(tmp_path):
    config = AutoConfig.for_model("mamba", vocab_size=48, hidden_size=16, num_hidden_layers=1, state_size=4)
    config.save_pretrained(tmp_path)
    with pytest.raises(CannotCombine, match="MambaForCausalLM: expected a model of attention"):
        symmetries(tmp_path)
