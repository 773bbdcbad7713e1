"""Folders become the models they are, or say what is wrong with them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from graft import data, models
from graft.data.tokenizers import train_tokenizer
from graft.errors import CheckpointError, RequestError

SMALL = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def made(kind):
    torch.manual_seed(0)
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SMALL))
    if kind == "qwen":
        return Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2))
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=kind == "tied"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    raw = data.parse({"source": "python-library", "packages": ["json"], "splits": {"dev": 0, "test": 0}})
    return train_tokenizer(data.open_corpus({"c": raw}, "c", tmp_path_factory.mktemp("c")), "bpe", 400)


@pytest.mark.parametrize("kind", ["llama", "tied", "bert", "t5", "qwen"])
def test_what_is_saved_is_what_is_loaded(tmp_path, kind, tokenizer):
    model = made(kind)
    models.save(model, tokenizer, tmp_path)
    loaded = models.load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert (tmp_path / "generation_config.json").exists() == model.can_generate()


@pytest.mark.parametrize("kind", ["llama", "qwen", "bert"])
def test_a_tokenizer_cuts_as_it_did_whatever_the_model_beside_it(tmp_path, kind, tokenizer):
    models.save(made(kind), tokenizer, tmp_path)
    text = "def f(x):\n    return  x  # ünï 漢"
    loaded = models.load_tokenizer(tmp_path)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_a_dtype_can_be_asked_for_and_is_otherwise_the_stored_one(tmp_path):
    models.save(made("llama").bfloat16(), None, tmp_path)
    assert models.load(tmp_path).dtype == torch.bfloat16
    assert models.load(tmp_path, dtype="float32").dtype == torch.float32


def test_a_folder_that_is_not_there_does_not_mean_the_network(tmp_path):
    with pytest.raises(RequestError, match="expected a model's folder, found none; one on the hub needs"):
        models.load(tmp_path / "org" / "name")


def test_weights_that_are_missing_are_named(tmp_path):
    models.save(made("llama"), None, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing 1: model.norm.weight"):
        models.load(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    models.save(made("llama"), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(CheckpointError, match="do not load"):
        models.load(tmp_path)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    models.save(made("llama"), None, tmp_path)
    with pytest.raises(RequestError, match="expected a tokenizer"):
        models.load_tokenizer(tmp_path)


def test_a_model_is_sharded_when_it_is_large(tmp_path):
    models.save(made("llama"), None, tmp_path, shard_bytes=10_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert models.load(tmp_path).num_parameters() == made("llama").num_parameters()
