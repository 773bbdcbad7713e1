"""Weights in pickles: refused unless allowed, and then read as tensors and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import adapter
from small_family import merge, model, save, tensors

import graft
from graft.errors import CannotCombine, CheckpointError, RecipeError
from graft.facts import facts_of
from graft.models import load
from graft.recipe import read_recipe


def pickled(folder, out, *, shards=1, legacy=False, content=None):
    """The model in `folder` as PyTorch saved models before safetensors."""
    copy = Path(shutil.copytree(folder, out))
    found = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    if content is not None:
        torch.save(content, copy / "pytorch_model.bin")
    elif shards == 1:
        torch.save(found, copy / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    else:
        names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
        where = {name: names[i % shards] for i, name in enumerate(found)}
        for file in names:
            torch.save({n: t for n, t in found.items() if where[n] == file}, copy / file)
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return copy


SOUP = {"method": "linear", "models": {"a": 1, "b": 3}}


@pytest.mark.parametrize("how", [{}, {"shards": 3}, {"legacy": True}])
def test_a_pickle_is_merged_as_its_tensors_are_where_that_is_allowed(how, folders, tmp_path):
    old = folders | {"a": pickled(folders["a"], tmp_path / "a", **how)}
    with pytest.raises(CannotCombine, match=r"a is stored as a pickle.*`allow_pickle: true` \(--allow-pickle\)"):
        merge(SOUP, old, tmp_path / "no")
    assert not list((tmp_path / "no").iterdir())
    out, _ = merge(SOUP | {"allow_pickle": True}, old, tmp_path / "out")
    wanted, _ = merge(SOUP, folders, tmp_path / "wanted")
    assert out.keys() == wanted.keys()
    assert all(torch.equal(out[name], wanted[name]) for name in out)


def test_a_tied_matrix_that_a_pickle_holds_twice_is_taken_once(tmp_path):
    both = {n: save(model(0, tie_word_embeddings=True), tmp_path / n) for n in "ab"}
    found = load_file(both["a"] / "model.safetensors")
    twice = found | {"lm_head.weight": found["model.embed_tokens.weight"]}
    old = both | {"a": pickled(both["a"], tmp_path / "old", content=twice)}
    out, _ = merge(SOUP | {"allow_pickle": True}, old, tmp_path / "out")
    assert "lm_head.weight" not in out
    assert load(tmp_path / "out").config.tie_word_embeddings


class Program:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "run"))


def test_a_program_in_a_pickle_is_never_run(folders, tmp_path):
    evil = pickled(folders["a"], tmp_path / "a", content={"model.norm.weight": Program(tmp_path / "ran")})
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin: expected a pickle of tensors alone.* it calls \S+, "
    ) as told:
        merge(SOUP | {"allow_pickle": True}, folders | {"a": evil}, tmp_path / "out")
    assert "weights_only" not in str(told.value), "the way around it"
    assert not (tmp_path / "ran").exists()
    assert facts_of(evil).stored == "pickle"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"w": torch.zeros(2)}}, "expected tensors by name, found a mapping with model"),
        ([torch.zeros(2)], "expected tensors by name, found list"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content, message, folders, tmp_path):
    other = pickled(folders["a"], tmp_path / "a", content=content)
    with pytest.raises(CheckpointError, match=message):
        merge(SOUP | {"allow_pickle": True}, folders | {"a": other}, tmp_path / "out")


def test_a_torn_pickle_and_a_missing_shard_are_named(folders, tmp_path):
    torn = pickled(folders["a"], tmp_path / "torn")
    content = (torn / "pytorch_model.bin").read_bytes()
    (torn / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"torn/pytorch_model.bin: expected a pickle of tensors"):
        merge(SOUP | {"allow_pickle": True}, folders | {"a": torn}, tmp_path / "1")
    short = pickled(folders["a"], tmp_path / "short", shards=2)
    (short / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"missing 1 of 2 shards: pytorch_model-00002-of-00002.bin"):
        merge(SOUP | {"allow_pickle": True}, folders | {"a": short}, tmp_path / "2")


def test_a_recipe_says_before_it_runs_that_a_pickle_is_not_read(folders, tmp_path):
    pickled(folders["a"], tmp_path / "old")
    text = "family: old\nmodels:\n  a: {{load: old}}\n  b: {{load: {b}}}\n  {more}\n"
    (tmp_path / "r.yaml").write_text(text.format(b=folders["b"], more="duo: {ensemble: {members: [a, b]}}"))
    with pytest.raises(RecipeError, match=r"a is stored as a pickle: \{merge: \{models: \[a\], allow_pickle: true\}\}"):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(
        text.format(b=folders["b"], more="soup: {merge: {models: [a, b], method: linear, allow_pickle: true}}")
    )
    done = graft.run(tmp_path / "r.yaml", tmp_path / "run")
    out, a, b = tensors(done.folder / "models" / "soup"), tensors(folders["a"]), tensors(folders["b"])
    assert all(torch.equal(out[n], (a[n] * 0.5).add(b[n], alpha=0.5)) for n in out)


def test_an_adapter_in_a_pickle_is_merged_as_its_factors_are(folders, tmp_path):
    """As older versions of peft save it; it finds a base that it names as seen from its own folder."""
    plain = adapter(folders["base"], tmp_path / "plain", 1)
    shutil.copytree(folders["base"], tmp_path / "under")
    old = Path(shutil.copytree(plain, tmp_path / "old"))
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    config = json.loads((old / "adapter_config.json").read_text())
    (old / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../under"}))
    both = folders | {"plain": plain, "old": old}
    added = {"method": "task_arithmetic", "base": "base"}
    with pytest.raises(CannotCombine, match="old is stored as a pickle"):
        merge(added | {"models": ["old", "a"]}, both, tmp_path / "no")
    made, _ = merge(added | {"models": ["old", "a"], "allow_pickle": True}, both, tmp_path / "out")
    wanted, _ = merge(added | {"models": ["plain", "a"]}, both, tmp_path / "wanted")
    for name, value in made.items():
        # the two bases are one model in two folders: a change is then a difference, rounded once more
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)
    alone, _ = merge({"models": ["old"], "allow_pickle": True}, both, tmp_path / "alone")
    assert not torch.equal(
        alone["model.layers.0.mlp.up_proj.weight"], tensors(folders["base"])["model.layers.0.mlp.up_proj.weight"]
    )
    assert graft.relate(old, folders["a"], allow_pickle=True).kind == "same initialisation"
