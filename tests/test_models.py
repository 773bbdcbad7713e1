"""Folders become the models they are, or say what is wrong with them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import graft
from graft import data, models
from graft.chatting import Talk
from graft.data.tokenizers import train_tokenizer
from graft.errors import CheckpointError, GraftError, RecipeError, RequestError
from graft.facts import facts_of
from graft.run import run

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


def loaded_by_recipe(folder):
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(f"family: f\nmodels:\n  a: {{load: {folder}}}\n")
    return run(recipe, folder.parent / f"{folder.name}-run")


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


def test_a_folder_without_a_configuration_or_with_a_damaged_one_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"expected a model's folder with config\.json, found none"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(CheckpointError, match=r"config\.json: the configuration is damaged"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"damaged \(expected names with values, found '\[1\]'\)"):
        models.load(tmp_path)


def test_a_type_that_transformers_does_not_know_is_refused_by_all_that_load_it(tmp_path):
    models.save(made("llama"), None, tmp_path / "strange")
    says(tmp_path / "strange", model_type="frobnicate", architectures=["FrobnicateForCausalLM"])
    words = r"strange is of the model_type 'frobnicate', which transformers [\d.]+ does not know: install"
    with pytest.raises(RequestError, match=words):
        models.load(tmp_path / "strange")
    with pytest.raises(RecipeError, match=words):
        graft.quantize(tmp_path / "out", from_=str(tmp_path / "strange"), bits=8)
    (tmp_path / "r.yaml").write_text(
        "family: f\nmodels:\n  strange: {load: strange}\n  small: {quantize: {from: strange, bits: 8}}\n"
    )
    with pytest.raises(RecipeError, match=f"line 4: models.small.quantize: {words}"):
        graft.plan(tmp_path / "r.yaml")
    graft.merge(tmp_path / "copy", models=[str(tmp_path / "strange")], method="linear")
    assert (tmp_path / "copy" / "model.safetensors").is_file()


def test_weights_that_are_missing_are_named(tmp_path):
    models.save(made("llama"), None, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing 1: model.norm.weight"):
        models.load(tmp_path)


def says(folder, **settings):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


def two_layers(kind):
    layers = {"gpt2": {"n_layer": 2}, "t5": {"num_layers": 2, "num_decoder_layers": 2}}
    configs = {
        "llama": lambda own: LlamaForCausalLM(LlamaConfig(**SMALL | own)),
        "bert": lambda own: BertForMaskedLM(BertConfig(**SMALL | own)),
        "gpt2": lambda own: GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_head=2, **own)),
        "t5": lambda own: T5ForConditionalGeneration(
            T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=32, num_heads=2, **own)
        ),
    }
    return configs[kind](layers.get(kind, {"num_hidden_layers": 2}))


@pytest.mark.parametrize("whole", [models.load, loaded_by_recipe], ids=["load", "recipe"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"intermediate_size": 48}, r"model.layers.0.mlp.gate_proj.weight is \[32, 16\], expected \[48, 16\]; "),
        ({"num_hidden_layers": 3}, r"missing 9: model.layers.2.input_layernorm.weight, "),
        ({"num_hidden_layers": 1}, r"no block for 9: model.layers.1.input_layernorm.weight, "),
    ],
)
def test_a_configuration_of_other_weights_is_refused(tmp_path, settings, words, whole):
    models.save(two_layers("llama"), None, tmp_path)
    says(tmp_path, **settings)
    with pytest.raises(GraftError, match=f"do not fit config.json, which says LlamaForCausalLM: .*{words}"):
        whole(tmp_path)


@pytest.mark.parametrize("whole", [models.load, loaded_by_recipe], ids=["load", "recipe"])
def test_a_configuration_that_was_edited_after_the_model_was_made_is_refused_where_it_does_not_fit(tmp_path, whole):
    models.save(two_layers("llama"), None, tmp_path / "a")
    loaded_by_recipe(tmp_path / "a")
    made = tmp_path / "a-run" / "models" / "a"
    says(made, rope_theta=5000.0)
    models.load(made)
    says(made, num_hidden_layers=1)
    facts_of(made)  # notes the new stamps of its files, since the weights are the same
    with pytest.raises(GraftError, match=r"do not fit config.json, .* no block for 9: model.layers.1.input_layernorm"):
        whole(made)


def test_a_plan_finds_it_from_headers_and_looks_once(tmp_path, monkeypatch):
    models.save(two_layers("llama"), None, tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    says(tmp_path / "bad", intermediate_size=48)
    (tmp_path / "r.yaml").write_text("family: f\nmodels:\n  bad: {load: bad}\n  good: {load: good}\n")
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a plan loads nothing"))
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "known"))
    with pytest.raises(RecipeError) as error:
        graft.plan(tmp_path / "r.yaml")
    (problem,) = error.value.problems
    assert str(problem).startswith(f"line 3: models.bad.load: {tmp_path / 'bad'}: the weights do not fit config.json")
    monkeypatch.setattr(models, "made_empty", lambda config: pytest.fail("the model was looked at before"))
    (tmp_path / "r.yaml").write_text("family: f\nmodels:\n  good: {load: good}\n")
    graft.plan(tmp_path / "r.yaml")


def test_a_command_on_such_a_folder_says_so_before_it_starts(tmp_path):
    models.save(two_layers("llama"), None, tmp_path / "bad")
    says(tmp_path / "bad", num_hidden_layers=1)
    with pytest.raises(RecipeError, match=r"do not fit config\.json"):
        graft.quantize(tmp_path / "out", from_=str(tmp_path / "bad"), bits=8)
    assert not (tmp_path / "out").exists()


def test_a_configuration_as_it_was_made_with_is_not_asked_again(tmp_path, monkeypatch):
    models.save(two_layers("llama"), None, tmp_path / "a")
    loaded_by_recipe(tmp_path / "a")
    monkeypatch.setattr(models, "made_empty", lambda config: pytest.fail("the model was built to be looked at"))
    models.load(tmp_path / "a-run" / "models" / "a")


@pytest.mark.parametrize(
    ("kind", "layers"), [("bert", "num_hidden_layers"), ("gpt2", "n_layer"), ("t5", "num_decoder_layers")]
)
def test_fewer_layers_than_there_are_weights_of_are_refused_whatever_the_architecture(tmp_path, kind, layers):
    models.save(two_layers(kind), None, tmp_path)
    models.load(tmp_path)
    says(tmp_path, **{layers: 1})
    with pytest.raises(CheckpointError, match=r"no block for \d+: "):
        models.load(tmp_path)


def test_a_configuration_that_says_nothing_but_its_type_builds_nothing(tmp_path, monkeypatch):
    """It stands for a model of billions of parameters."""
    models.save(made("llama"), None, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is \[400, 16\], expected \[32000, 4096\]"):
        models.load(tmp_path)


def test_stored_tensors_that_no_model_needs_do_not_matter(tmp_path):
    """Those of another task's head, and what earlier versions of transformers stored for each layer."""
    model = two_layers("llama")
    models.save(model, None, tmp_path)
    more = {"score.weight": torch.ones(2, 16), "model.layers.5.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(tmp_path / "model.safetensors") | more, tmp_path / "model.safetensors", {"format": "pt"})
    assert models.load(tmp_path).num_parameters() == model.num_parameters()


def test_weights_without_a_head_or_with_one_too_many_fit_the_model_below_it(tmp_path):
    model = two_layers("llama")
    models.save(model, None, tmp_path)
    says(tmp_path, architectures=["LlamaModel"])
    assert torch.equal(models.load(tmp_path).norm.weight, model.model.norm.weight)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in weights.items() if name != "lm_head.weight"}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    says(tmp_path, architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    assert torch.equal(models.load(tmp_path).lm_head.weight, weights["model.embed_tokens.weight"])


def test_of_tied_weights_either_may_be_stored(tmp_path):
    models.save(made("tied"), None, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(models.load(tmp_path).lm_head.weight, weights["lm_head.weight"])


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    models.save(made("llama"), None, tmp_path)
    with pytest.raises(RequestError, match="expected a tokenizer"):
        models.load_tokenizer(tmp_path)


def test_a_model_is_sharded_when_it_is_large(tmp_path):
    models.save(made("llama"), None, tmp_path, shard_bytes=10_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert models.load(tmp_path).num_parameters() == made("llama").num_parameters()


@pytest.mark.parametrize("content", ['{"broken', '{"model": {}}', '{"model": {"type": "BPE", "vocab": "x"}}', "[]"])
def test_a_damaged_tokenizer_is_named_whoever_meets_it(tmp_path, tokenizer, content):
    models.save(made("llama"), tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "d.txt").write_text("some text\n" * 9)
    words = r"tokenizer\.json: expected a tokenizer, found a damaged file \("
    with pytest.raises(CheckpointError, match=words):
        models.load_tokenizer(tmp_path)
    with pytest.raises(RequestError, match=words):
        Talk(tmp_path)
    with pytest.raises(RecipeError, match=words):
        graft.tune(tmp_path / "out", from_=str(tmp_path), data=str(tmp_path / "d.txt"))


def test_a_folder_without_a_tokenizer_is_named_in_a_line(tmp_path):
    models.save(made("llama"), None, tmp_path)
    with pytest.raises(RequestError) as error:
        Talk(tmp_path)
    assert str(error.value) == f"{tmp_path}: expected a tokenizer (tokenizer.json), found none"
