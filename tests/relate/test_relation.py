"""Families made for it: what `graft relate` says of each pair, by their weights and by their manifests."""

import json
import shutil
from dataclasses import replace

import pytest
import relatives
import torch
from safetensors.torch import load_file, save_file
from small_adapters import adapter
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import graft
from graft.cli import app
from graft.errors import CannotCombine, GraftError, RequestError
from graft.lineage import Manifest, write_manifest


def save(model, folder, words=96, first="w"):
    model.save_pretrained(folder)
    vocab = {f"{first if i > 40 else 'w'}{i}": i for i in range(words)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0").save_pretrained(folder)
    return folder


def manifest(folder, initialisation, hash="h", **more):
    facts = {"name": "m", "verb": "tune", "verb_version": 1, "key": "k", "vocabulary": "v", "architecture": "decoder"}
    write_manifest(folder, Manifest(**facts, hash=hash, initialisation=initialisation, parameters=1, **more))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    base = relatives.trained(relatives.fresh(0), 0)
    one, two = relatives.trained(base, 1), relatives.trained(base, 2)
    made = {
        "base": base,
        "one": one,
        "two": two,
        "merged": relatives.merged(one, two),
        "pruned": relatives.pruned(one),
        "quantised": relatives.quantised(one),
        "channels": relatives.permuted(one, residual=False),
        "everything": relatives.permuted(one),
        "same_start": relatives.trained(relatives.fresh(0), 3, steps=60),
        "same_text": relatives.trained(relatives.fresh(1), 0, steps=60),
        "again": relatives.copy(base),
    }
    return {name: save(model, root / name) for name, model in made.items()}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("base", "one"),
        ("one", "two"),
        ("base", "merged"),
        ("base", "pruned"),
        ("two", "quantised"),
        ("base", "same_start"),
    ],
)
def test_relatives_are_recognised_by_their_weights(family, a, b):
    found = graft.relate(family[a], family[b])
    assert (found.kind, found.weights, found.predictions) == ("same initialisation", "yes", "yes")
    assert found.p == 0.0001
    assert found.correlation > 0.3


@pytest.mark.parametrize("other", ["channels", "everything"])
def test_a_relative_whose_units_stand_in_another_order_needs_alignment(family, other):
    found = graft.relate(family["base"], family[other])
    assert (found.kind, found.weights, found.predictions) == ("permuted", "after alignment", "yes")
    assert found.correlation > 0.7


def test_permuting_keeps_what_the_model_computes(family):
    ids = relatives.text(5, rows=4)
    one, other = (graft.load(family[name]) for name in ("one", "everything"))
    assert torch.allclose(one(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-4)


def test_the_same_text_does_not_make_relatives(family):
    found = graft.relate(family["base"], family["same_text"])
    assert (found.kind, found.weights) == ("other initialisation", "after alignment")
    assert found.p > 0.001


def test_a_folder_and_its_copy(family):
    assert graft.relate(family["base"], family["base"]).kind == "same folder"
    found = graft.relate(family["base"], family["again"])
    assert (found.kind, found.weights) == ("same weights", "yes")


def test_weights_that_differ_only_late_in_one_tensor_are_not_the_same(family, tmp_path):
    model = graft.load(family["base"])
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1
    assert graft.relate(family["base"], save(model, tmp_path / "late")).kind == "same initialisation"


def test_weights_stored_as_8_bit_integers_with_scales_are_recognised(family, tmp_path):
    folder = save(graft.load(family["one"]), tmp_path / "int8")
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            stored |= {name: (weight / scale).round().to(torch.int8), name + "_scale": scale}
        else:
            stored[name] = weight
    save_file(stored, folder / "model.safetensors")
    found = graft.relate(family["base"], folder)
    assert found.kind == "same initialisation"
    assert found.correlation == pytest.approx(graft.relate(family["base"], family["one"]).correlation, abs=0.01)


def test_sizes_and_architectures(family, tmp_path):
    wide = save(relatives.fresh(intermediate_size=128), tmp_path / "wide")
    found = graft.relate(family["base"], wide)
    assert (found.kind, found.weights, found.predictions) == ("different size", "no", "yes")
    assert "intermediate_size 96 and 128" in found.evidence
    other = save(GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)), tmp_path / "gpt2")
    found = graft.relate(family["base"], other)
    assert (found.kind, found.weights, found.predictions) == ("different architecture", "no", "yes")


def test_gpt2_stores_its_matrices_the_other_way_and_is_recognised(tmp_path):
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    base, other = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    folders = [save(m, tmp_path / n) for m, n in [(base, "a"), (relatives.nudged(base), "b"), (other, "c")]]
    assert graft.relate(*folders[:2]).kind == "same initialisation"
    assert graft.relate(folders[0], folders[2]).kind == "other initialisation"


def test_another_vocabulary_is_shown_by_token_strings(family, tmp_path):
    other = save(graft.load(family["one"]), tmp_path / "other", first="x")
    found = graft.relate(family["base"], other)
    assert (found.vocabulary.a, found.vocabulary.b, found.vocabulary.shared) == (96, 96, 41)
    assert (found.kind, found.weights) == ("same initialisation", "after alignment")
    assert found.predictions == "with vocabulary handling"
    assert "43% of the smaller" in found.predictions_why


def test_a_model_with_more_rows_of_embeddings_is_still_a_relative(family, tmp_path):
    model = graft.load(family["one"])
    model.resize_token_embeddings(104)
    found = graft.relate(family["base"], save(model, tmp_path / "grown", words=100))
    assert (found.kind, found.weights, found.vocabulary.shared) == ("same initialisation", "after alignment", 96)


def test_weights_that_correlate_outweigh_manifests_that_name_two_starts(family, tmp_path):
    folders = [save(graft.load(family[name]), tmp_path / name) for name in ("base", "one")]
    for folder in folders:
        manifest(folder, folder.name, hash=folder.name)
    found = graft.relate(*folders)
    assert (found.kind, found.weights) == ("same initialisation", "yes")
    assert "without `anyway`" in found.evidence


def test_without_a_tokenizer_nothing_is_said_about_tokens(family, tmp_path):
    graft.load(family["one"]).save_pretrained(tmp_path / "bare")
    found = graft.relate(family["base"], tmp_path / "bare")
    assert (found.vocabulary, found.predictions) == (None, "with vocabulary handling")


def test_manifests_name_a_common_start_that_the_weights_no_longer_show(tmp_path):
    folders = [save(relatives.fresh(i), tmp_path / str(i)) for i in range(3)]
    for folder, start in zip(folders, ["s", "s", "t"], strict=True):
        manifest(folder, start, hash=folder.name)
    found = graft.relate(*folders[:2])
    assert (found.kind, found.weights) == ("same initialisation", "no")
    assert "only a trace" in found.weights_why
    found = graft.relate(*folders[1:])
    assert found.kind == "other initialisation"
    assert "two initialisations" in found.evidence


def test_an_ensemble_has_no_weights_to_combine(family, tmp_path):
    folder = save(relatives.fresh(2), tmp_path / "duo")
    manifest(folder, "of:x", mergeable=False)
    found = graft.relate(folder, family["base"])
    assert (found.kind, found.weights, found.predictions) == ("ensemble", "no", "yes")


@pytest.fixture(scope="module")
def adapters(family, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: adapter(family["base"], root / name, seed) for seed, name in enumerate("xy")}


def test_an_adapter_is_related_as_the_model_that_it_makes_of_its_base(family, adapters, tmp_path):
    found = graft.relate(adapters["x"], family["one"])
    assert (found.kind, found.weights, found.predictions) == ("same initialisation", "yes", "yes")
    assert f"{adapters['x']} is an adapter, read as the model that it makes of {family['base']}" in found.evidence
    whole = save(graft.load(adapters["x"]), tmp_path / "whole")
    assert found.correlation == pytest.approx(graft.relate(whole, family["one"]).correlation, abs=1e-5)
    assert graft.relate(adapters["x"], adapters["y"]).kind == "same initialisation"
    assert graft.relate(family["same_text"], adapters["x"]).kind == "other initialisation"
    assert graft.relate(adapters["x"], adapters["x"]).kind == "same folder"
    assert graft.relate(adapters["x"], shutil.copytree(adapters["x"], tmp_path / "again")).kind == "same weights"


def test_an_adapter_on_another_base_is_its_relative(family, adapters, tmp_path):
    lost = shutil.copytree(adapters["x"], tmp_path / "lost")
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/not-here"}))
    with pytest.raises(CannotCombine, match="the model it names is not on this machine: say which it is"):
        graft.relate(lost, family["one"])
    other = graft.relate(lost, family["one"], adapters_of=family["same_text"])
    assert other.kind == "other initialisation"
    words = ["relate", str(lost), str(family["one"]), "--adapters-of", str(family["base"]), "--json"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["correlation"] == graft.relate(adapters["x"], family["one"]).correlation


def test_pickles_are_related_where_they_are_allowed(family, tmp_path):
    old = shutil.copytree(family["one"], tmp_path / "old")
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"old is stored as a pickle.*`allow_pickle: true` \(--allow-pickle\)"):
        graft.relate(family["base"], old)
    found = graft.relate(family["base"], old, allow_pickle=True)
    assert replace(found, b=str(family["one"])) == graft.relate(family["base"], family["one"])
    assert graft.relate(family["one"], old, allow_pickle=True).kind == "same weights"
    told = CliRunner().invoke(app, ["relate", str(family["base"]), str(old), "--allow-pickle"])
    assert told.exit_code == 0, told.output


def test_a_folder_without_a_model_is_an_error_that_says_so(family, tmp_path):
    with pytest.raises(RequestError, match=r"expected a model's folder"):
        graft.relate(family["base"], tmp_path / "nothing")


def test_the_command_prints_a_table_or_one_json_value(family):
    words = ["relate", str(family["base"]), str(family["one"])]
    shown = CliRunner().invoke(app, words).stdout
    assert "same initialisation" in shown
    assert "yes: any method of merge" in shown
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["kind"] == "same initialisation"


@pytest.mark.parametrize(("other", "kind"), [("same_text", "other initialisation"), ("channels", "permuted")])
def test_of_another_start_and_another_vocabulary_only_predictions_can_be_combined(family, tmp_path, other, kind):
    folder = save(graft.load(family[other]), tmp_path / "other", first="x")
    found = graft.relate(family["base"], folder)
    assert (found.kind, found.weights, found.predictions) == (kind, "no", "with vocabulary handling")
    assert "one vocabulary only" in found.weights_why
    advice = graft.explain([family["base"], folder])
    assert (advice.method, list(advice.also)) == (
        "none",
        ["an ensemble with `vocabulary: union` (or bytes): graft ensemble OUT MODEL… --vocabulary union"],
    )
    with pytest.raises(GraftError, match="different vocabularies"):
        graft.merge(tmp_path / "out", models=[family["base"], folder], method="rebasin")


def test_encoder_decoders_of_two_starts_are_not_sent_to_an_alignment_that_refuses_them(tmp_path):
    shape = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 2, "vocab_size": 96}
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **shape, decoder_start_token_id=0))
        folders.append(save(model, tmp_path / f"t5-{seed}"))
    found = graft.relate(*folders)
    assert (found.kind, found.weights) == ("other initialisation", "no")
    assert "`rebasin`, which would match their units first, takes no encoder–decoders" in found.weights_why
    with pytest.raises(GraftError, match="the mean of their weights is no model; an ensemble") as error:
        graft.merge(tmp_path / "out", models=folders)
    assert "rebasin" not in str(error.value)
