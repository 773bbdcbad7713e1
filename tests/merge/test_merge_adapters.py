"""Adapters of peft as parents: what a merge makes of them is what it makes of the models that peft folds them into."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folded_twins import CLOSE, METHODS, check_as_folded
from safetensors.torch import load_file, save_file
from small_adapters import adapter, folded
from small_family import family, merge, model, save, tensors, tokenizer, with_nan
from transformers import GPT2Config, GPT2LMHeadModel

import graft
import graft.merge.stream
from graft.errors import CannotCombine, CheckpointError, RecipeError, RequestError
from graft.facts import facts_of
from graft.models import load, load_tokenizer
from graft.recipe import read_recipe

KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "r": 3},
    "ranks and alphas of their own": {
        "rank_pattern": {"up_proj": 2, r"layers.0.*q_proj": 6},
        "alpha_pattern": {"layers.1.mlp.down_proj": 5},
    },
    "every linear layer": {"target_modules": "all-linear"},
    "whole tensors too": {"modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "biases": {"bias": "all"},
    "lengths of rows": {"use_dora": True, "target_modules": "all-linear"},
}


pytestmark = pytest.mark.usefixtures("many_pieces")
PIECE = 100


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    made = family(root, 2)
    made["x"] = adapter(made["base"], root / "x", 1)
    made["y"] = adapter(made["base"], root / "y", 2, r=2, use_rslora=True, target_modules=["q_proj", "o_proj"])
    for name in ("x", "y"):
        made[f"{name} folded"] = _folded(made["base"], made[name], root / f"{name}-folded")
    return made


def _folded(base, folder, out):
    made = load(base)
    made.load_state_dict(folded(base, folder))
    return save(made, out)


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_alone_is_what_peft_folds(kind, folders, tmp_path):
    added = adapter(folders["base"], tmp_path / "added", 5, **KINDS[kind])
    out, _ = merge({"method": "linear", "models": ["added"]}, {"added": added}, tmp_path / "out")
    wanted = folded(folders["base"], added)
    same(out, wanted)
    same(load(tmp_path / "out").state_dict(), wanted)
    same(load(added).state_dict(), wanted)


@pytest.mark.parametrize("dora", [False, True])
def test_weights_that_are_stored_turned_are_changed_turned(dora, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    base = save(GPT2LMHeadModel(config), tmp_path / "base")
    turned = {"fan_in_fan_out": True, "use_dora": dora}
    added = adapter(base, tmp_path / "added", target_modules=["c_attn", "attn.c_proj"], **turned)
    out, _ = merge({"method": "linear", "models": ["added"]}, {"added": added}, tmp_path / "out")
    wanted = folded(base, added)
    same(out, {name: wanted[name] for name in out})
    found = load(added).state_dict()
    same({name: found[name] for name in out}, {name: wanted[name] for name in out})


def test_a_checkpoint_without_the_first_part_of_its_names_is_understood(tmp_path):
    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    base = save(made, tmp_path / "base")
    added = adapter(base, tmp_path / "added", target_modules=["c_attn"], fan_in_fan_out=True)
    wanted = folded(base, added)
    bare = {n.removeprefix("transformer."): t for n, t in tensors(base).items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    out, _ = merge({"method": "linear", "models": ["added"]}, {"added": added}, tmp_path / "out")
    torch.testing.assert_close(out["h.0.attn.c_attn.weight"], wanted["transformer.h.0.attn.c_attn.weight"], **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_adapters_of_unequal_ranks(name, folders, tmp_path):
    check_as_folded(name, folders, tmp_path)


def test_adapters_and_models_are_merged_with_each_other(folders, tmp_path):
    out, _ = merge({"method": "linear", "models": {"a": 1, "x": 3}}, folders, tmp_path / "out")
    a, x = tensors(folders["a"]), folded(folders["base"], folders["x"])
    same(out, {name: 0.25 * a[name] + 0.75 * x[name] for name in out})


def test_deltas_come_from_the_factors_and_not_from_a_rounded_difference(folders, tmp_path, monkeypatch):
    """A base far larger than the delta: (θ₀ + δ) − θ₀ in float32 would have lost most of δ."""
    base = load(folders["base"])
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.add_(1000.0)
    big = save(base, tmp_path / "base")
    seen = []
    deltas = graft.merge.stream.Piece.deltas
    monkeypatch.setattr(
        graft.merge.stream.Piece,
        "deltas",
        lambda self: (seen.append((self.start, deltas(self)[0].clone())), deltas(self))[1],
    )
    settings = {"method": "ties", "base": "base", "models": ["x"], "density": 1.0, "adapters_of": "base"}
    merge(settings, {"base": big, "x": folders["x"]}, tmp_path / "out")
    factors = load_file(folders["x"] / "adapter_model.safetensors")
    at = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    exact = 2.0 * factors[at.format("B")] @ factors[at.format("A")]
    found = [d for _, d in seen if len(d) == PIECE and torch.allclose(d, exact.view(-1)[:PIECE], rtol=1e-4, atol=1e-7)]
    assert found


def test_the_dtype_of_the_base_is_kept(folders, tmp_path):
    half = save(load(folders["base"]), tmp_path / "base", dtype=torch.bfloat16)
    settings = {"method": "linear", "models": ["x"], "adapters_of": "half"}
    out, _ = merge(settings, {"x": folders["x"], "half": half}, tmp_path / "out")
    assert {t.dtype for t in out.values()} == {torch.bfloat16}


def test_an_output_matrix_that_the_base_ties_comes_apart_where_the_adapter_changes_it(tmp_path):
    base = save(model(0, tie_word_embeddings=True), tmp_path / "base")
    added = adapter(base, tmp_path / "added", target_modules=["lm_head"])
    out, _ = merge({"method": "linear", "models": ["added"]}, {"added": added}, tmp_path / "out")
    factors = load_file(added / "adapter_model.safetensors")
    change = 2.0 * factors["base_model.model.lm_head.lora_B.weight"] @ factors["base_model.model.lm_head.lora_A.weight"]
    embed = tensors(base)["model.embed_tokens.weight"]
    assert torch.equal(out["model.embed_tokens.weight"], embed)
    torch.testing.assert_close(out["lm_head.weight"], embed + change, **CLOSE)
    assert not load(tmp_path / "out").config.tie_word_embeddings


def renamed(folder, out, **changes):
    copy = Path(shutil.copytree(folder, out))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | changes))
    return copy


def test_the_base_is_the_one_the_adapter_names_else_the_merges_else_the_one_given(folders, tmp_path):
    lost = renamed(folders["x"], tmp_path / "lost", base_model_name_or_path="org/not-here")
    beside = renamed(folders["x"], tmp_path / "beside", base_model_name_or_path="../base")
    shutil.copytree(folders["base"], tmp_path / "base")
    wanted = folded(folders["base"], folders["x"])
    here = folders | {"lost": lost, "beside": beside}
    same(merge({"method": "linear", "models": ["beside"]}, here, tmp_path / "1")[0], wanted)
    same(merge({"method": "task_arithmetic", "base": "base", "models": ["lost"]}, here, tmp_path / "2")[0], wanted)
    given = {"method": "linear", "models": ["lost"], "adapters_of": "base"}
    same(merge(given, here, tmp_path / "3")[0], wanted)
    with pytest.raises(CannotCombine, match="lost is an adapter, and the model it names is not on this machine"):
        merge({"method": "linear", "models": ["lost"]}, here, tmp_path / "4")
    verb = graft.merge.VERB
    models = {"lost": facts_of(lost), "base": facts_of(folders["base"])}
    (problem,) = verb.check(verb.parse({"method": "linear", "models": ["lost"]}), models)
    assert "say which it is, as `adapters_of`" in problem
    made = verb.facts(verb.parse(given), models, "key")
    assert made == replace(facts_of(folders["base"]), folder="")


def damaged(folder, out, change):
    copy = Path(shutil.copytree(folder, out))
    held = load_file(copy / "adapter_model.safetensors")
    save_file(change(held), copy / "adapter_model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bdlora": True}, "expected a plain LoRA adapter, found use_bdlora"),
        ({"peft_type": "IA3"}, "expected a LoRA adapter, found IA3"),
        ({"init_lora_weights": "pissa"}, r"its start \(pissa\) changed the weights of the base"),
    ],
)
def test_what_is_no_sum_with_its_base_is_refused(changes, message, folders, tmp_path):
    other = renamed(folders["x"], tmp_path / "other", **changes)
    with pytest.raises(RequestError, match=message):
        merge({"method": "linear", "models": ["other"]}, {"other": other}, tmp_path / "out")


def test_lengths_of_rows_that_are_missing_or_of_embeddings_are_told_of(folders, tmp_path):
    whole = adapter(folders["base"], tmp_path / "whole", 1, use_dora=True, target_modules=["q_proj"])
    less = damaged(whole, tmp_path / "less", lambda held: {n: t for n, t in held.items() if "magnitude" not in n})
    with pytest.raises(CheckpointError, match=r"expected .*q_proj.lora_magnitude_vector beside .*lora_A.*, found none"):
        merge({"method": "linear", "models": ["less"]}, {"less": less}, tmp_path / "1")
    tokens = adapter(folders["base"], tmp_path / "tokens", 1, use_dora=True, target_modules=["embed_tokens"])
    with pytest.raises(RequestError, match=r"DoRA on embeddings .*: fold it into its base first"):
        merge({"method": "linear", "models": ["tokens"]}, {"tokens": tokens}, tmp_path / "2")
    with pytest.raises(CannotCombine, match=r"the adapter multiplies .*q_proj.weight, which is no sum of factors"):
        merge({"method": "add_adapters", "models": ["whole", "x"]}, folders | {"whole": whole}, tmp_path / "3")


def test_a_damaged_or_foreign_adapter_is_refused(folders, tmp_path):
    half = damaged(folders["x"], tmp_path / "half", lambda held: {n: t for n, t in held.items() if "lora_B" not in n})
    with pytest.raises(CheckpointError, match=r"expected .*lora_B.weight beside .*lora_A.weight, found none"):
        merge({"method": "linear", "models": ["half"]}, {"half": half}, tmp_path / "1")
    wide = save(model(0, intermediate_size=40), tmp_path / "wide")
    settings = {"method": "linear", "models": ["x"], "adapters_of": "wide"}
    with pytest.raises(CannotCombine, match=r"by \[.*\], its base has \[.*\]: it was trained on another model"):
        merge(settings, {"x": folders["x"], "wide": wide}, tmp_path / "2")
    flat = save(model(0, num_hidden_layers=1), tmp_path / "flat")
    with pytest.raises(CannotCombine, match=r"changes model.layers.1.*, which its base does not have"):
        merge({**settings, "adapters_of": "flat"}, {"x": folders["x"], "flat": flat}, tmp_path / "3")
    sick = damaged(folders["x"], tmp_path / "sick", lambda held: {n: t * float("nan") for n, t in held.items()})
    for method in ({"method": "linear"}, {"method": "ties", "base": "base"}):
        with pytest.raises(CheckpointError, match=r"sick: NaN or Inf in model.layers.*\(.*sick/adapter_model.safetens"):
            merge(method | {"models": ["sick"]}, folders | {"sick": sick}, tmp_path / "4")


def test_where_the_base_of_an_adapter_has_nan_its_file_is_named(folders, tmp_path):
    base = with_nan(folders["base"], tmp_path / "base", "q_proj.weight")
    here = {"x": folders["x"], "base": base}
    with pytest.raises(CheckpointError, match=r"x: NaN or Inf in model.layers.*q_proj.*\(.*base/model.safetensors\)"):
        merge({"method": "linear", "models": ["x"], "adapters_of": "base"}, here, tmp_path / "out")


def test_a_nan_in_an_adapter_beside_more_tokens_is_found_in_its_file(folders, tmp_path):
    """Readers of rows in another order know the file too."""
    large = save(model(7, near=None, vocab_size=60), tmp_path / "large", words=60)
    sick = with_nan(folders["x"], tmp_path / "sick", "lora_B.weight")
    settings = {"method": "linear", "models": ["large", "sick"], "vocabulary": "union", "anyway": True}
    with pytest.raises(CheckpointError, match=r"sick: NaN or Inf in model.layers.*\(.*sick/adapter_model.safetensors"):
        merge(settings, {"large": large, "sick": sick}, tmp_path / "out")


RECIPE = """
family: adapted
models:
  base: {{load: {base}}}
  x: {{load: {x}}}
  y: {{load: {y}}}
  both: {{merge: {{method: task_arithmetic, base: base, models: {{x: 0.7, y: 0.3}}}}}}
  {more}
"""


def written(folders, root, more=""):
    (root / "r.yaml").write_text(RECIPE.format(**{n: folders[n] for n in ("base", "x", "y")}, more=more))
    return root / "r.yaml"


def test_a_recipe_merges_adapters_and_knows_it_before(folders, tmp_path):
    recipe = written(folders, tmp_path)
    facts = read_recipe(recipe).facts()
    assert facts["x"].stored == "adapter"
    assert facts["both"].stored == "safetensors"
    done = graft.run(recipe, tmp_path / "run")
    out = tensors(done.folder / "models" / "both")
    base, x, y = tensors(folders["base"]), *(folded(folders["base"], folders[n]) for n in "xy")
    same(out, {n: base[n] + 0.7 * (x[n] - base[n]) + 0.3 * (y[n] - base[n]) for n in out})
    assert graft.run(recipe, tmp_path / "run").made == []


def test_an_adapter_whose_base_is_not_here_is_refused_by_other_verbs(folders, tmp_path):
    renamed(folders["x"], tmp_path / "lost", base_model_name_or_path="org/not-here")
    more = "lost: {load: lost}\n  duo: {ensemble: {combine: linear, members: [base, lost]}}"
    with pytest.raises(RecipeError, match="lost is an adapter whose base is not on this machine"):
        read_recipe(written(folders, tmp_path, more))


def test_an_adapter_is_loaded_with_its_base(folders):
    loaded = {name: weight.detach() for name, weight in load(folders["x"]).state_dict().items()}
    same(loaded, folded(folders["base"], folders["x"]))
    assert load_tokenizer(folders["x"]).get_vocab() == load_tokenizer(folders["base"]).get_vocab()


def test_one_command_merges_adapters(folders, tmp_path):
    out = graft.merge(tmp_path / "out", method="linear", models={str(folders["x"]): 1, str(folders["y"]): 1})
    x, y = (folded(folders["base"], folders[n]) for n in "xy")
    same(tensors(out), {n: (x[n] + y[n]) / 2 for n in x})


def test_an_adapter_is_a_member_of_an_ensemble_and_is_measured_like_any_model(folders, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "w3 w5 w{i}"}}\n' for i in range(4)))
    more = (
        "duo: {ensemble: {combine: linear, members: [base, x]}}\n"
        "data: {t: {source: jsonl, train: t.jsonl}}\nevaluate: [{measure: bits_per_byte, on: [t.train]}]"
    )
    done = graft.run(written(folders, tmp_path, more), tmp_path / "run")
    rows = map(json.loads, (done.folder / "results.jsonl").read_text().splitlines())
    scores = {row["model"]: row["value"] for row in rows if row["kind"] == "score"}
    assert {"base", "x", "y", "both", "duo"} <= set(scores)
    assert scores["x"] != scores["base"]


def test_an_adapter_may_bring_tokens_of_its_own(folders, tmp_path):
    """As chat adapters do: the embeddings grew, are held whole, and the tokenizer lies beside the factors."""
    grown = load(folders["base"])
    grown.resize_token_embeddings(50, mean_resizing=False)
    wide = save(grown, tmp_path / "wide", words=50)
    added = adapter(wide, tmp_path / "added", 3, modules_to_save=["embed_tokens", "lm_head"])
    tokenizer(50).save_pretrained(added)
    wanted = folded(wide, added)
    own = renamed(added, tmp_path / "own", base_model_name_or_path=str(folders["base"]))
    out, found = merge({"method": "linear", "models": ["own"]}, {"own": own}, tmp_path / "out")
    same(out, wanted)
    assert load(tmp_path / "out").config.vocab_size == 50
    assert len(load_tokenizer(tmp_path / "out")) == 50
    same({name: t.detach() for name, t in load(own).state_dict().items()}, wanted)
    assert len(load_tokenizer(own)) == 50
    with pytest.raises(CannotCombine, match="different vocabularies"):
        merge({"method": "linear", "models": ["a", "own"]}, folders | {"own": own}, tmp_path / "no")
    settings = {"method": "linear", "models": ["a", "own"], "vocabulary": "union"}
    both, _ = merge(settings, folders | {"own": own}, tmp_path / "both")
    embed, a = "model.embed_tokens.weight", tensors(folders["a"])
    torch.testing.assert_close(both[embed][:48], (a[embed] + wanted[embed][:48]) / 2, **CLOSE)
    torch.testing.assert_close(both[embed][48:], wanted[embed][48:], **CLOSE)
    assert found["notes"]["config_from"] == "own"
