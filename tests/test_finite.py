"""NaN and Inf in weights are found before anything is computed with them, and named: tensor, count, file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import graft
from graft import data, finite, lineage, models
from graft.adapters.folder import load as load_adapted
from graft.adapters.folder import save as save_adapters
from graft.adapters.point import Point
from graft.adapters.stack import adopt
from graft.checkpoint import ADAPTER, LORA, SINGLE
from graft.cli import app
from graft.data.tokenizers import train_tokenizer
from graft.errors import CheckpointError, RecipeError, RunError
from graft.finite import check_folder, check_tensors, check_weights
from graft.lora import CONFIG

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(6, dtype=torch.int64)}
NAME = "model.layers.0.mlp.up_proj.weight"


def llama(**settings):
    torch.manual_seed(0)
    own = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, **own, **settings))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    raw = data.parse({"source": "python-library", "packages": ["json"], "splits": {"dev": 0, "test": 0}})
    return train_tokenizer(data.open_corpus({"c": raw}, "c", tmp_path_factory.mktemp("c")), "bpe", 400)


def damaged(file, name, value=float("nan"), count=2):
    held = load_file(file)
    held[name].view(-1)[:count] = value
    save_file(held, file, {"format": "pt"})


@pytest.fixture
def sick(tmp_path, tokenizer):
    """A folder without a manifest, two of whose weights are NaN."""
    models.save(llama(), tokenizer, tmp_path / "sick")
    damaged(tmp_path / "sick" / SINGLE, NAME)
    return tmp_path / "sick"


@pytest.fixture
def well(tmp_path, tokenizer):
    models.save(llama(), tokenizer, tmp_path / "well")
    return tmp_path / "well"


NAMED = rf"sick: NaN or Inf in {NAME} \(2 of 512 values, {SINGLE}\): train or download it anew"


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 1), (-float("inf"), 1)])
def test_nan_and_inf_are_found_and_named(tmp_path, value, count):
    broken = TENSORS["a"].clone()
    broken[1, 2] = value
    save_file({**TENSORS, "a": broken}, tmp_path / SINGLE)
    words = rf"NaN or Inf in a \({count} of 12 values, {SINGLE}\)"
    with pytest.raises(CheckpointError, match=words):
        check_weights(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        check_tensors({**TENSORS, "a": broken}, tmp_path / SINGLE)


def test_whole_weights_pass(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    check_weights(tmp_path)
    check_tensors(TENSORS, tmp_path / SINGLE)


def test_large_numbers_whose_sum_is_not_finite_pass():
    check_tensors({"a": torch.full((64,), 3e38), "b": torch.full((4096,), 6e4).half()}, Path(SINGLE))


def test_many_tensors_are_counted_and_five_named(tmp_path):
    bad = {name: torch.tensor([float("nan")]) for name in "abcdefg"}
    with pytest.raises(CheckpointError, match=r"e \(1 of 1 values, x\) and 2 more: train"):
        check_tensors(bad, tmp_path / "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_folder_without_a_manifest_is_looked_at_when_it_is_loaded(well, value):
    damaged(well / SINGLE, NAME, value)
    with pytest.raises(CheckpointError, match=NAMED.replace("sick", "well")):
        graft.load(well)
    with pytest.raises(CheckpointError, match=NAMED.replace("sick", "well")):
        graft.load(well, dtype="bfloat16")


def test_shards_are_named(tmp_path):
    models.save(llama(), None, tmp_path, shard_bytes=10_000)
    file = tmp_path / json.loads((tmp_path / f"{SINGLE}.index.json").read_text())["weight_map"][NAME]
    damaged(file, NAME)
    with pytest.raises(CheckpointError, match=rf"{NAME} \(2 of 512 values, {file.name}\)"):
        models.load(tmp_path)


def test_weights_are_looked_at_before_they_are_packed(sick):
    with pytest.raises(CheckpointError, match=NAMED):
        models.load(sick, quantization=BitsAndBytesConfig(load_in_8bit=True))


def test_a_manifest_vouches_for_its_weights(well, monkeypatch):
    """They were looked at when it was made, and the hash says that they are the same."""
    manifest = {
        "name": "well", "verb": "pretrain", "verb_version": 1, "key": "k", "hash": lineage.hash_model(well),
        "initialisation": "i", "vocabulary": "v", "architecture": "decoder", "parameters": 1,
    }  # fmt: skip
    lineage.write_manifest(well, lineage.Manifest(**manifest, files=lineage.stamps(well)))
    monkeypatch.setattr(finite, "finite", lambda _: pytest.fail("looked at again"))
    monkeypatch.setattr(finite, "check_weights", lambda _: pytest.fail("read again"))
    models.load(well)
    check_folder(well)


def test_a_type_too_narrow_for_the_weights_is_named(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    models.save(model, None, tmp_path)
    with pytest.raises(CheckpointError, match=r"Inf in model.norm.weight as torch.float16, which cannot hold"):
        models.load(tmp_path, dtype="float16")
    assert models.load(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def lora(folder, base):
    """An adapter in the form of peft on one matrix of the base."""
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (folder / CONFIG).write_text(json.dumps({**told, "target_modules": ["up_proj"]}))
    start = f"base_model.model.{NAME.removesuffix('.weight')}"
    factors = {f"{start}.lora_A.weight": torch.ones(2, 16), f"{start}.lora_B.weight": torch.ones(32, 2)}
    save_file(factors, folder / LORA, {"format": "pt"})
    return folder, f"{start}.lora_B.weight"


def test_an_adapter_of_peft_is_looked_at_with_its_base(tmp_path, well, sick):
    folder, name = lora(tmp_path / "lora", well)
    models.load(folder)
    check_folder(folder)
    damaged(folder / LORA, name)
    for look in (models.load, check_folder):
        with pytest.raises(CheckpointError, match=rf"lora: NaN or Inf in {name} \(2 of 64 values, {LORA}\)"):
            look(folder)
    on_sick, _ = lora(tmp_path / "other", sick)
    for look in (models.load, check_folder):
        with pytest.raises(CheckpointError, match=NAMED):
            look(on_sick)


def test_an_adapter_is_looked_at_with_its_base(tmp_path, well):
    model = models.load(well)
    adopt(model, [Point(form="linear", on=["up"], size=2)], "own", base=well)
    save_adapters(model, tmp_path / "own")
    load_adapted(tmp_path / "own")
    held = load_file(tmp_path / "own" / ADAPTER)
    name = next(iter(held))
    damaged(tmp_path / "own" / ADAPTER, name, count=1)
    for look in (models.load, check_folder):
        with pytest.raises(CheckpointError, match=rf"own: NaN or Inf in .* \(1 of \d+ values, {ADAPTER}\)"):
            look(tmp_path / "own")


def family(folder, **models):
    lines = [f"  {name}: {{load: {place}}}\n" for name, place in models.items()]
    path = folder / "family.yaml"
    path.write_text(f"family: f\nmodels:\n  even: {{merge: {{models: [good]}}}}\n{''.join(lines)}")
    return path


def test_a_sick_model_is_found_when_it_is_brought_in_and_nothing_is_made_of_it(tmp_path, well, sick):
    recipe = family(tmp_path, good=well, bad=sick)
    recipe.write_text(recipe.read_text() + "  both: {merge: {models: [good, bad]}}\n")
    with pytest.raises(RunError, match=NAMED) as error:
        graft.run(recipe, tmp_path / "run")
    assert "not made, because they hang on what failed: both" in str(error.value)
    assert sorted(path.name for path in (tmp_path / "run" / "models").iterdir()) == ["even", "good"]


def test_sick_models_are_found_before_others_are_made(tmp_path, well, sick, monkeypatch):
    begun = []
    monkeypatch.setattr("graft.run.say", begun.append)
    with pytest.raises(RunError):
        graft.run(family(tmp_path, good=well, bad=sick), tmp_path / "run")
    assert [line.partition(":")[0] for line in begun if line.endswith(("load", "merge of good"))] == [
        "good",
        "bad",
        "even",
    ]


def test_a_sick_adapter_is_found_when_it_is_brought_in(tmp_path, well):
    folder, name = lora(tmp_path / "lora", well)
    damaged(folder / LORA, name)
    with pytest.raises(RunError, match=rf"lora: NaN or Inf in {name}"):
        graft.run(family(tmp_path, good=well, bad=folder), tmp_path / "run")


def cut(folder):
    file = folder / SINGLE
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(folder):
    model = models.load(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[-1].unlink()


@pytest.mark.parametrize(
    ("damage", "words"), [(cut, "truncated; get the file anew"), (lose_a_shard, r"missing 1 of \d shards: model-0000")]
)
def test_a_truncated_file_and_a_missing_shard_are_found_when_a_run_is_planned(tmp_path, well, damage, words):
    damage(well)
    with pytest.raises(RecipeError, match=rf"line 4: models\.good\.load: .*({words})"):
        graft.plan(family(tmp_path, good=well))


def test_an_ensemble_of_a_sick_model_is_not_made(tmp_path, well, sick):
    with pytest.raises(RunError, match=NAMED):
        graft.ensemble(tmp_path / "duo", members=[sick, well])
    assert not (tmp_path / "duo").exists()


def test_an_ensemble_is_looked_at_in_all_its_members(tmp_path, well):
    shutil.copytree(well, tmp_path / "sick")
    graft.ensemble(tmp_path / "duo", members=[tmp_path / "sick", well])
    (tmp_path / "duo" / "graft.json").unlink()
    check_folder(tmp_path / "duo")
    damaged(tmp_path / "sick" / SINGLE, NAME)
    with pytest.raises(CheckpointError, match=NAMED):
        check_folder(tmp_path / "duo")


def test_talking_with_a_sick_model_and_tuning_it_name_the_weights(tmp_path, sick):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "x y {n}"}}\n' for n in range(200)))
    for words in (
        ["chat", sick, "-p", "x"],
        ["tune", tmp_path / "out", "--from", sick, "--data", tmp_path / "x.jsonl", "--budget", "1 steps"],
        ["eval", sick, "--on", tmp_path / "x.jsonl", "--out", tmp_path / "rows"],
    ):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 1, result.output
        assert f"NaN or Inf in {NAME} (2 of 512 values, {SINGLE})" in result.stderr
