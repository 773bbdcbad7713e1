"""Adapters out of adapters, and out of the difference of two models; peft loads what is written."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_adapters import adapter, folded
from small_family import family, merge, model, save, tensors, with_nan
from transformers import GPT2Config, GPT2LMHeadModel

import graft
import graft.merge
from graft.errors import CannotCombine, CheckpointError, SettingsError
from graft.facts import facts_of
from graft.lora import read_lora
from graft.merge._factors import Pair, concatenated, count, factored, refactored
from graft.models import load

CLOSE = {"rtol": 1e-4, "atol": 2e-6}
"""Factors in float32 multiplied out again."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    made = family(root, 2)
    made["x"] = adapter(made["base"], root / "x", 1, r=3)
    made["y"] = adapter(made["base"], root / "y", 2, r=2, use_rslora=True, target_modules=["q_proj", "o_proj"])
    made["whole"] = adapter(made["base"], root / "whole", 3, r=2, modules_to_save=["lm_head"])
    return made


def test_thin_factors_of_a_matrix_are_its_best_of_that_rank():
    torch.manual_seed(0)
    for shape in ((20, 30), (30, 20), (8, 8)):
        matrix = torch.randn(shape)
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        for rank in (1, 5, 8):
            pair = factored(matrix, rank, None)
            torch.testing.assert_close(
                (pair.b @ pair.a).double(), u[:, :rank] * s[:rank] @ vh[:rank], rtol=1e-4, atol=1e-5
            )
            assert pair.error == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-6)
    nothing = factored(torch.zeros(4, 6), 2, None)
    assert not (nothing.b @ nothing.a).any()


def test_the_factors_of_a_product_are_found_without_multiplying_it_out():
    torch.manual_seed(0)
    pair = concatenated([Pair(torch.randn(3, 40), torch.randn(30, 3)), Pair(torch.randn(2, 40), torch.randn(30, 2))])
    product = pair.b @ pair.a
    for rank in (1, 3, 5):
        found, wanted = refactored(pair, rank, None), factored(product, rank, None)
        torch.testing.assert_close(found.b @ found.a, wanted.b @ wanted.a, rtol=1e-4, atol=1e-4)
        assert found.error == pytest.approx(wanted.error, abs=1e-6)


def test_so_many_columns_are_kept_as_the_energy_needs():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert [count(values, None, share) for share in (0.1, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert count(values, 2, 1.0) == 2
    assert count(values, 3, None) == 3
    assert count(torch.zeros(3), None, 0.5) == 1


def change(base, folder):
    """What an adapter's folder does to the base, by peft."""
    before = tensors(base)
    return {name: value - before[name] for name, value in folded(base, folder).items()}


def test_adapters_are_added_up_exactly(folders, tmp_path):
    settings = {"method": "add_adapters", "models": {"x": 0.7, "y": -0.4}}
    out, found = merge(settings, folders, tmp_path / "out")
    assert {t.shape[0] for n, t in out.items() if "q_proj.lora_A" in n} == {5}
    x, y, made = (change(folders["base"], f) for f in (folders["x"], folders["y"], tmp_path / "out"))
    for name in made:
        torch.testing.assert_close(made[name], 0.7 * x[name] - 0.4 * y[name], **CLOSE)
    assert found["notes"]["exact"]
    assert found["notes"]["ranks"]["model.layers.0.self_attn.q_proj"] == 5
    assert found["notes"]["ranks"]["model.layers.0.mlp.up_proj"] == 3


def test_an_average_of_adapters_is_the_average_of_the_models(folders, tmp_path):
    merge({"method": "add_adapters", "models": ["x", "y"], "normalise": True}, folders, tmp_path / "thin")
    wanted, _ = merge({"method": "linear", "models": ["x", "y"]}, folders, tmp_path / "models")
    found, _ = merge({"method": "linear", "models": ["thin"]}, {"thin": tmp_path / "thin"}, tmp_path / "made")
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **CLOSE)


def test_a_smaller_rank_is_the_best_of_that_rank_and_its_error_is_told(folders, tmp_path):
    settings = {"method": "add_adapters", "models": ["x", "y"], "rank": 2}
    out, found = merge(settings, folders, tmp_path / "out")
    assert {t.shape[0] for n, t in out.items() if "lora_A" in n} == {2}
    assert not found["notes"]["exact"]
    x, y, made = (change(folders["base"], f) for f in (folders["x"], folders["y"], tmp_path / "out"))
    module = "model.layers.0.self_attn.q_proj"
    wanted = x[f"{module}.weight"] + y[f"{module}.weight"]
    s = torch.linalg.svdvals(wanted.double())
    error = float((made[f"{module}.weight"] - wanted).norm() / wanted.norm())
    assert error == pytest.approx(float(s[2:].norm() / s.norm()), abs=1e-4)
    assert found["notes"]["relative_error"][module] == pytest.approx(error, abs=1e-4)


def test_a_rank_above_what_the_layer_has_is_refactored_without_loss(folders, tmp_path):
    many = {f"m{i}": adapter(folders["base"], tmp_path / f"m{i}", i, r=6, target_modules=["k_proj"]) for i in range(3)}
    out, found = merge({"method": "add_adapters", "models": list(many)}, many, tmp_path / "out")
    assert {t.shape[0] for n, t in out.items() if "lora_A" in n} == {8}
    assert found["notes"]["exact"]
    made = change(folders["base"], tmp_path / "out")
    wanted = [change(folders["base"], folder) for folder in many.values()]
    for name in made:
        torch.testing.assert_close(made[name], sum(w[name] for w in wanted), **CLOSE)


def test_tensors_that_adapters_hold_whole_are_added_as_differences(folders, tmp_path):
    _, found = merge({"method": "add_adapters", "models": {"x": 1, "whole": 0.5}}, folders, tmp_path / "out")
    assert found["notes"]["whole_tensors"] == ["lm_head.weight"]
    made, whole = change(folders["base"], tmp_path / "out"), change(folders["base"], folders["whole"])
    torch.testing.assert_close(made["lm_head.weight"], 0.5 * whole["lm_head.weight"], **CLOSE)


def test_embeddings_are_added_up_too(folders, tmp_path):
    both = {
        n: adapter(folders["base"], tmp_path / n, i, r=2, target_modules=["embed_tokens"]) for i, n in enumerate("uv")
    }
    merge({"method": "add_adapters", "models": ["u", "v"]}, both, tmp_path / "out")
    made, u, v = (change(folders["base"], f) for f in (tmp_path / "out", *both.values()))
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(made[name], u[name] + v[name], **CLOSE)


def test_models_and_foreign_adapters_are_not_added_up(folders, tmp_path):
    with pytest.raises(CannotCombine, match="a is a model: `extract_lora` makes an adapter of its difference"):
        merge({"method": "add_adapters", "models": ["x", "a"]}, folders, tmp_path / "1")
    other = save(model(9), tmp_path / "other")
    foreign = folders | {"z": adapter(other, tmp_path / "z", 1)}
    with pytest.raises(CannotCombine, match="z and x stand on different bases"):
        merge({"method": "add_adapters", "models": ["x", "z"]}, foreign, tmp_path / "2")
    with pytest.raises(SettingsError, match="expected whole adapters with one weight each"):
        graft.merge.VERB.parse({"method": "add_adapters", "models": {"x": [0, 1]}})


@pytest.mark.parametrize(
    ("added", "ending", "more"),
    [("x", "lora_A.weight", {}), ("y", "lora_B.weight", {"rank": 2}), ("whole", "lm_head.weight", {"normalise": True})],
)
def test_an_adapter_with_nan_is_never_added_up(added, ending, more, folders, tmp_path):
    here = folders | {"sick": with_nan(folders[added], tmp_path / "sick", ending)}
    with pytest.raises(CheckpointError, match=rf"sick: NaN or Inf in base_model.*{ending} \(.*sick/adapter_model"):
        merge({"method": "add_adapters", "models": ["x", "sick"]} | more, here, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("ending", ["down_proj.weight", "norm.weight", "embed_tokens.weight"])
def test_a_model_with_nan_gives_no_adapter(ending, folders, tmp_path):
    here = folders | {"sick": with_nan(folders["a"], tmp_path / "sick", ending)}
    for base, tuned in (("base", "sick"), ("sick", "b")):
        with pytest.raises(CheckpointError, match=rf"sick: NaN or Inf in model.*{ending} \(.*sick/model.safetensors"):
            merge({"method": "extract_lora", "base": base, "models": [tuned], "rank": 4}, here, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_what_the_stored_type_cannot_hold_is_not_written(folders, tmp_path):
    settings = {"method": "add_adapters", "models": {"x": 1e6}, "dtype": "float16"}
    with pytest.raises(CheckpointError, match=r"lora_B.weight: the adapter has values that float16 cannot hold"):
        merge(settings, folders, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("option", [{"vocabulary": "union"}, {"part": ["model."]}])
def test_an_adapter_has_the_tensors_and_rows_of_its_base(option):
    verb = graft.merge.VERB
    with pytest.raises(SettingsError, match="expected no `part` and no `vocabulary`"):
        verb.parse({"method": "add_adapters", "models": ["x"]} | option)
    with pytest.raises(SettingsError, match="expected no `part` and no `vocabulary`"):
        verb.parse({"method": "extract_lora", "base": "base", "models": ["a"], "rank": 2} | option)


def test_all_of_a_difference_is_extracted_where_nothing_is_cut(folders, tmp_path):
    settings = {"method": "extract_lora", "base": "base", "models": ["a"], "energy": 1.0, "whole": ["*"]}
    out, found = merge(settings, folders, tmp_path / "out")
    made, a = folded(folders["base"], tmp_path / "out"), tensors(folders["a"])
    assert made.keys() == a.keys()
    for name in a:
        torch.testing.assert_close(made[name], a[name], **CLOSE)
    assert found["notes"]["share_kept"] == pytest.approx(1)
    assert found["notes"]["left_out"] == []
    assert out


def test_a_rank_is_the_best_of_that_rank_and_what_is_lost_is_told(folders, tmp_path):
    settings = {"method": "extract_lora", "base": "base", "models": ["a"], "rank": 4}
    _, found = merge(settings, folders, tmp_path / "out")
    made, base, a = change(folders["base"], tmp_path / "out"), tensors(folders["base"]), tensors(folders["a"])
    kept = total = 0.0
    for name in a:
        wanted = a[name] - base[name]
        total += float(wanted.square().sum())
        if "layers" in name and wanted.dim() == 2:
            u, s, vh = torch.linalg.svd(wanted.double(), full_matrices=False)
            torch.testing.assert_close(made[name].double(), u[:, :4] * s[:4] @ vh[:4], rtol=1e-3, atol=1e-5)
            error = float(s[4:].norm() / s.norm())
            assert found["notes"]["relative_error"][name.removesuffix(".weight")] == pytest.approx(error, abs=1e-5)
            kept += float(s[:4].square().sum())
        else:
            assert not made[name].any()
            assert name in found["notes"]["left_out"]
    assert found["notes"]["share_kept"] == pytest.approx(kept / total, abs=1e-5)


def test_energy_gives_each_layer_its_own_rank(folders, tmp_path):
    settings = {"method": "extract_lora", "base": "base", "models": ["a"], "energy": 0.6}
    _, found = merge(settings, folders, tmp_path / "out")
    assert len(set(found["notes"]["ranks"].values())) > 1
    assert max(found["notes"]["relative_error"].values()) <= 0.4**0.5
    torch.testing.assert_close(
        folded(folders["base"], tmp_path / "out")["model.layers.1.mlp.up_proj.weight"],
        merge({"method": "linear", "models": ["o"]}, {"o": tmp_path / "out"}, tmp_path / "m")[0][
            "model.layers.1.mlp.up_proj.weight"
        ],
        **CLOSE,
    )


def test_an_adapter_is_found_again_in_the_model_it_was_folded_into(folders, tmp_path):
    merge({"method": "linear", "models": ["x"]}, folders, tmp_path / "model")
    here = folders | {"model": tmp_path / "model"}
    _, found = merge({"method": "extract_lora", "base": "base", "models": ["model"], "rank": 3}, here, tmp_path / "out")
    assert max(found["notes"]["relative_error"].values()) < 1e-3
    assert {name.rpartition(".")[2] for name in found["notes"]["ranks"]} == {"q_proj", "up_proj", "down_proj"}


def test_a_turned_model_gives_an_adapter_that_peft_turns(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    base = GPT2LMHeadModel(config)
    other = GPT2LMHeadModel(config)
    other.load_state_dict({n: t + 0.01 * torch.randn_like(t) for n, t in base.state_dict().items()})
    both = {"base": save(base, tmp_path / "base"), "a": save(other, tmp_path / "a")}
    settings = {"method": "extract_lora", "base": "base", "models": ["a"], "energy": 1.0, "anyway": True}
    merge(settings, both, tmp_path / "out")
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(folded(both["base"], tmp_path / "out")[name], tensors(both["a"])[name], **CLOSE)


def test_what_is_wrong_is_said_before_anything_is_read(folders, tmp_path):
    verb = graft.merge.VERB
    with pytest.raises(SettingsError, match="expected `rank`, `energy` or both"):
        verb.parse({"method": "extract_lora", "base": "base", "models": ["a"]})
    with pytest.raises(CannotCombine, match="do not differ in any layer"):
        settings = {"method": "extract_lora", "base": "base", "models": ["same"], "rank": 2}
        merge(settings, folders | {"same": shutil.copytree(folders["base"], tmp_path / "same")}, tmp_path / "out")


def test_a_recipe_extracts_adds_up_and_measures(folders, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""
family: thin
models:
  base: {{load: {folders["base"]}}}
  a: {{load: {folders["a"]}}}
  b: {{load: {folders["b"]}}}
  thin_a: {{merge: {{method: extract_lora, base: base, models: [a], rank: 4}}}}
  thin_b: {{merge: {{method: extract_lora, base: base, models: [b], rank: 4}}}}
  both: {{merge: {{method: add_adapters, models: {{thin_a: 0.5, thin_b: 0.5}}}}}}
  full: {{merge: {{method: task_arithmetic, base: base, models: [both]}}}}
"""
    )
    done = graft.run(recipe, tmp_path / "run")
    place = done.folder / "models"
    assert facts_of(place / "both").stored == "adapter"
    assert read_lora(place / "both").changes
    assert json.loads((place / "thin_a" / "graft.json").read_text())["notes"]["share_kept"] > 0.3
    parts = [change(folders["base"], place / name) for name in ("thin_a", "thin_b")]
    base, full = tensors(folders["base"]), tensors(place / "full")
    for name in full:
        torch.testing.assert_close(full[name], base[name] + 0.5 * (parts[0][name] + parts[1][name]), **CLOSE)
    assert graft.run(recipe, tmp_path / "run").made == []
    ids = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(load(place / "base"), place / "both")(ids).logits
        torch.testing.assert_close(load(place / "both")(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert load_file(place / "both" / "adapter_model.safetensors")
