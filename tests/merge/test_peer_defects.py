"""What other mergers get wrong, each tried here. Where a defect has a file of its own, the last test says which."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import adapter
from small_family import merge, model, save, tensors
from streaming import relatives, streamed

import graft
import graft.checkpoint
from graft.errors import CannotCombine, SettingsError
from graft.merge import VERB


@pytest.mark.parametrize(
    ("misspelt", "right"),
    [({"denisty": 0.2}, "density"), ({"dtpye": "float32"}, "dtype"), ({"normalize": True}, "normalise")],
)
def test_a_misspelt_option_is_refused_with_the_right_one(misspelt, right):
    with pytest.raises(SettingsError, match=f"did you mean '{right}'"):
        VERB.parse({"method": "ties", "base": "x", "models": ["a"]} | misspelt)


def test_a_misspelt_option_of_another_method_is_told_by_its_right_name():
    with pytest.raises(SettingsError, match=r"unknown key.*; other methods take `density`$"):
        VERB.parse({"models": ["a", "b"], "denisty": 0.2})


def test_rows_of_a_larger_vocabulary_are_never_dropped_silently(folders, tmp_path):
    large = save(model(0, vocab_size=80), tmp_path / "large", words=80)
    both = folders | {"large": large}
    with pytest.raises(CannotCombine, match="different vocabularies"):
        merge({"method": "linear", "models": ["a", "large"]}, both, tmp_path / "1")
    asked = {"method": "linear", "models": ["a", "large"], "vocabulary": "union", "anyway": True}
    out, _ = merge(asked, both, tmp_path / "2")
    assert out["model.embed_tokens.weight"].shape[0] == 80


def test_another_width_is_refused_from_the_headers(folders, tmp_path, monkeypatch):
    """Not one layer is taken from the base instead, and no tensor is read."""
    wide = save(model(0, intermediate_size=32), tmp_path / "wide")
    config = json.loads((folders["a"] / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(graft.checkpoint.TensorReader, "read_into", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CannotCombine, match=r"mlp.down_proj.weight is \[16, 24\] in .*a, \[16, 32\] in .*wide"):
        graft.merge(tmp_path / "out", method="linear", models=[folders["a"], wide])
    assert not (tmp_path / "out").exists()


SPHERES = {
    "slerp": {"models": ["a", "b"]},
    "nuslerp": {"models": ["a", "b"]},
    "multislerp": {"models": ["a", "b"]},
    "karcher": {"models": ["a", "b"]},
    "model_stock": {"base": "base", "models": ["a", "b"]},
}


@pytest.mark.parametrize("size", [1.0, 3e-4])
@pytest.mark.parametrize("name", SPHERES)
def test_equal_tensors_in_half_precision_give_themselves_and_no_nan(name, size, tmp_path):
    """Also where float16 would lose the squares."""
    parents = {model: {n: (size * t).half() for n, t in held.items()} for model, held in relatives(1).items()}
    parents["b"] = parents["a"]
    made = streamed({"method": name} | SPHERES[name], parents, tmp_path, dtype="F16")
    assert made.keys() == {"w", "v"}
    for tensor, value in made.items():
        assert value.dtype == torch.float16
        # one rounding to 11 bits, or to the least that float16 has
        torch.testing.assert_close(value.float(), parents["a"][tensor].float(), rtol=1e-3, atol=1e-4 * size + 6e-8)


def test_small_task_vectors_in_half_precision_are_added_before_they_are_rounded(tmp_path):
    """Each alone is below the spacing of float16 at 1; their sum is not."""
    base = torch.ones(4)
    parents = {"base": {"w": base}} | {n: {"w": base + 3e-4} for n in "abcd"}
    made = streamed({"method": "task_arithmetic", "base": "base", "models": [*"abcd"]}, parents, tmp_path, dtype="F16")
    torch.testing.assert_close(made["w"].float(), torch.full((4,), 1.0012), rtol=0, atol=5e-4)
    assert (made["w"] > 1).all()


def test_breadcrumbs_without_outliers_keep_the_delta(tmp_path):
    parents = relatives(1)
    settings = {"method": "breadcrumbs", "base": "base", "models": ["a"], "gamma": 0.0, "density": 0.9}
    made = streamed(settings, parents, tmp_path)
    kept = made["w"] != parents["base"]["w"]
    assert kept.double().mean() == pytest.approx(0.9, abs=0.02)


def test_a_missing_tensor_and_another_meaning_are_told(folders, tmp_path):
    short = Path(shutil.copytree(folders["b"], tmp_path / "b"))
    held = load_file(short / "model.safetensors")
    held.pop("model.norm.weight")
    save_file(held, short / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CannotCombine, match=r"b lacks a tensor that other parents have: model.norm.weight"):
        merge({"method": "linear", "models": ["a", "b"]}, folders | {"b": short}, tmp_path / "1")
    turned = Path(shutil.copytree(folders["b"], tmp_path / "turned"))
    config = json.loads((turned / "config.json").read_text())
    config["rope_parameters"] = dict(config["rope_parameters"], rope_theta=5e5)
    (turned / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    _, found = merge({"method": "linear", "models": ["a", "b"]}, folders | {"b": turned}, tmp_path / "2")
    told = " ".join(found["notes"]["config_differences"]["b"])
    assert "rope" in told
    assert "max_position_embeddings 32 and 64" in told


def test_an_adapter_is_merged_without_a_merged_copy(folders, tmp_path):
    """Nothing is written but the output, which is the base plus the change."""
    added = adapter(folders["base"], tmp_path / "added", 1)
    out, _ = merge(
        {"method": "ties", "base": "base", "models": ["x"], "density": 1.0}, folders | {"x": added}, tmp_path / "o"
    )
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"added", "o", "o.scratch"}
    assert {path.name for path in (tmp_path / "o.scratch").iterdir()} <= {"finished", "architectures"}
    assert not torch.equal(
        out["model.layers.0.mlp.up_proj.weight"], tensors(folders["base"])["model.layers.0.mlp.up_proj.weight"]
    )


def test_nothing_is_downloaded_or_read_before_all_headers_agree(folders, tmp_path, monkeypatch):
    """A model that cannot be merged is refused from headers and configurations."""
    deep = save(model(0, num_hidden_layers=3), tmp_path / "deep")
    monkeypatch.setattr(graft.checkpoint.TensorReader, "read_into", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CannotCombine, match="num_hidden_layers 2 and 3"):
        graft.merge(tmp_path / "out", method="ties", base=folders["base"], models=[folders["a"], deep])


def test_the_seed_of_a_random_merge_stands_in_its_manifest(folders, tmp_path):
    asked = {"method": "dare_ties", "base": folders["base"], "models": [folders["a"], folders["b"]]}
    out = graft.merge(tmp_path / "one", **asked, seed=7)
    assert json.loads((out / "graft.json").read_text())["seed"] == 7
    again = tensors(graft.merge(tmp_path / "again", **asked, seed=7))
    assert all(torch.equal(value, again[name]) for name, value in tensors(out).items())


def test_trimming_and_rescaling_have_both_forms(tmp_path):
    """That of the paper and that of the tool, by name, and they differ."""
    parents = relatives(2)
    parents["a"]["v"] = parents["base"]["v"] + 0.001
    for method, key, forms in (
        ("ties", "trim", ["tensor", "model"]),
        ("dare_linear", "rescale", ["probability", "l1"]),
        ("della", "rescale", ["probability", "l1"]),
    ):
        settings = {"method": method, "base": "base", "models": ["a", "b"], "density": 0.4}
        one, other = (streamed(settings | {key: form}, parents, tmp_path, seed=3) for form in forms)
        assert not all(torch.equal(one[name], other[name]) for name in one), method


TESTS = Path(__file__).parents[1]
ELSEWHERE = [
    ("merge/test_merge_engine.py", "test_a_killed_merge_goes_on_and_ends_with_the_same_bytes"),
    ("merge/test_merge_engine.py", "test_tied_weights_stay_tied"),
    ("merge/test_merge_engine.py", "test_a_tied_and_an_untied_parent_give_an_untied_model"),
    ("merge/test_merge_check.py", "test_what_does_not_fit_is_named"),
    ("merge/test_merge_methods.py", "test_every_method_writes_the_dtype_it_was_told"),
    ("merge/test_merge_methods.py", "test_ties_trims_the_whole_model_where_that_is_asked_for"),
    ("merge/test_merge_methods.py", "test_the_order_of_equal_models_changes_nothing"),
    ("merge/test_merge_adapters.py", "test_every_method_takes_adapters_of_unequal_ranks"),
    ("merge/test_merge_vocabulary.py", "test_models_with_permuted_vocabularies_merge_to_what_they_are_without"),
    ("merge/test_merge_pickles.py", "test_a_program_in_a_pickle_is_never_run"),
    ("deltas/test_deltas.py", "test_held_out_data_show_parents_mean_ensemble_and_barriers"),
    ("report/test_report.py", "test_a_combination_is_held_against_its_best_parent"),
]


@pytest.mark.parametrize(("file", "name"), ELSEWHERE)
def test_the_others_stand_where_they_are_said_to(file, name):
    assert f"def {name}(" in (TESTS / file).read_text()
