"""Parents that call the same tensor otherwise, or store what no model reads: a published base and its tuned kin."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import adapter
from small_family import family, merge, tensors, tokenizer
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import graft
from graft.errors import CannotCombine
from graft.merge.naming import alike
from graft.merge.telling import lines

GPT2 = GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
BERT = BertConfig(
    vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32,
)  # fmt: skip


def of_class(kind, config, root):
    """`base`, `a` and `b` near it: name → folder."""
    torch.manual_seed(0)
    base = kind(config)
    made = {}
    for name in ("base", "a", "b"):
        one = kind(config)
        one.load_state_dict(base.state_dict())
        if name != "base":
            with torch.no_grad():
                for weight in one.parameters():
                    weight.add_(0.005 * torch.randn_like(weight))
        one.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
        made[name] = root / name
    return made


def restored(folder, out, change):
    """A copy with other names and tensors."""
    shutil.copytree(folder, out)
    save_file(change(load_file(out / "model.safetensors")), out / "model.safetensors", metadata={"format": "pt"})
    return out


def published(held):
    """GPT-2's names without those of the head, with the masks that its first version stored."""
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(2)}
    return {name.removeprefix("transformer."): value for name, value in held.items()} | masks


def aged(held):
    """BERT's old names, and positions as a buffer."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    made = {}
    for name, value in held.items():
        end = next((end for end in old if name.endswith(end)), None)
        made[name.removesuffix(end) + old[end] if end else name] = value
    return made | {"bert.embeddings.position_ids": torch.arange(32)[None]}


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpt2")
    made = of_class(GPT2LMHeadModel, GPT2, root)
    return made | {"hub": restored(made["base"], root / "hub", published)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bert")
    made = of_class(BertForMaskedLM, BERT, root)
    return made | {"hub": restored(made["base"], root / "hub", aged)}


TIES = {"method": "ties", "models": ["a", "b"], "density": 0.4}


@pytest.mark.parametrize("kind", ["decoders", "encoders"])
def test_a_base_as_it_was_published_gives_the_merge_that_it_gives_saved_anew(kind, request, tmp_path):
    folders = request.getfixturevalue(kind)
    made, found = merge(TIES | {"base": "hub"}, folders, tmp_path / "hub")
    wanted, _ = merge(TIES | {"base": "base"}, folders, tmp_path / "base")
    assert made.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in made.items())
    assert found["notes"]["correlation_of_weights"].keys() == {"a", "b"}
    assert found["notes"]["unread"]


def test_what_no_model_reads_is_left_out_where_one_parent_lacks_it_and_told(decoders, tmp_path):
    _, found = merge({"models": ["a", "hub"]}, decoders, tmp_path / "out")
    assert found["notes"]["unread"] == {f"transformer.h.{layer}.attn.bias": ["hub"] for layer in range(2)}
    (told,) = [line for line in lines(found["notes"]) if line.startswith("left out")]
    assert told.startswith("left out: 2 tensors of hub that no such model reads (transformer.h.0.attn.bias")
    twice = {name: restored(decoders[name], tmp_path / name, published) for name in "ab"}
    kept, found = merge({"models": ["a", "b"]}, twice, tmp_path / "kept")
    assert "h.0.attn.c_attn.bias" in kept
    assert "h.0.attn.bias" not in kept
    assert found["notes"]["unread"]["h.0.attn.bias"] == ["a", "b"]


def test_a_tensor_that_the_model_reads_is_missed(decoders, tmp_path):
    short = restored(
        decoders["hub"], tmp_path / "short", lambda held: {n: v for n, v in held.items() if n != "wpe.weight"}
    )
    with pytest.raises(CannotCombine, match=r"short lacks a tensor that other parents have: transformer.wpe.weight"):
        merge({"models": ["a", "short"]}, decoders | {"short": short}, tmp_path / "out")


def test_an_adapter_goes_with_a_base_that_calls_its_tensors_otherwise(decoders, tmp_path):
    """Its changes are still added as such."""
    added = adapter(decoders["hub"], tmp_path / "added", 1, target_modules=["c_fc"], fan_in_fan_out=True)
    both = decoders | {"added": added}
    made, _ = merge({"method": "task_arithmetic", "base": "hub", "models": ["added", "a"]}, both, tmp_path / "out")
    alone, _ = merge({"method": "task_arithmetic", "base": "hub", "models": ["added"]}, both, tmp_path / "alone")
    base, tuned = tensors(decoders["base"]), tensors(decoders["a"])
    for name, value in made.items():
        change = alone.get(name.removeprefix("transformer."), alone.get(name)) - base[name]
        torch.testing.assert_close(value, tuned[name] + change, rtol=0, atol=2e-6)


def test_relatives_under_other_names_are_known(decoders):
    found = graft.relate(decoders["a"], decoders["hub"])
    assert found.kind == "same initialisation"
    assert graft.relate(decoders["base"], decoders["hub"]).correlation == pytest.approx(1)


def test_a_merge_of_matrices_takes_a_base_under_other_names(decoders, tmp_path):
    made, _ = merge({"method": "iso_c", "base": "hub", "models": ["a", "b"]}, decoders, tmp_path / "hub")
    wanted, _ = merge({"method": "iso_c", "base": "base", "models": ["a", "b"]}, decoders, tmp_path / "base")
    for name, value in made.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-7)


WAYS = {
    "fisher": {"models": ["a", "b"], "tokens": 128, "length": 16},
    "regmean_plus": {"models": ["a", "b"], "tokens": 128, "length": 16},
    "adamerging": {"models": ["a"], "base": "base", "steps": 1, "length": 16},
    "learned_soup": {"models": ["a", "b"], "epochs": 1, "rows": 4, "length": 16},
    "greedy_soup": {"models": ["a", "b"], "limit": 2},
    "rebasin": {"models": ["a", "b"]},
    "extract_lora": {"models": ["a"], "base": "base", "rank": 2},
}


@pytest.mark.parametrize("method", WAYS)
def test_methods_that_run_models_take_them_as_they_were_published(method, decoders, tmp_path):
    """With all that old versions stored, and what they find is what they find of the same models saved anew."""
    old = {n: restored(decoders[n], tmp_path / n, published) for n in ("base", "a", "b")}
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{" ".join(f"w{i * j % 48}" for j in range(20))}"}}\n' for i in range(1, 9)))
    on = {} if method in ("rebasin", "extract_lora") else {"on": str(text)}

    def made(name, folders):
        named = {key: folders[WAYS[method][key]] for key in ("base",) if key in WAYS[method]}
        options = WAYS[method] | on | named | {"models": [folders[model] for model in WAYS[method]["models"]]}
        return tensors(graft.merge(tmp_path / name, method=method, **options))

    # one parent under old names beside others; greedy soups compare models one by one
    found, wanted = made("mixed", old | {"a": decoders["a"]}), made("anew", decoders)
    assert found.keys() == wanted.keys() or method == "greedy_soup"
    for name, value in found.items():
        torch.testing.assert_close(value, wanted.get(name, wanted.get(f"transformer.{name}")), rtol=0, atol=1e-5)


def test_names_are_left_alone_where_all_are_the_same_and_where_nothing_fits():
    assert alike({"a": ["x.0.y"], "b": ["x.0.y"]}) == {"a": {}, "b": {}}
    assert alike({"a": ["x.0.y"], "b": ["z.0.w"]}) == {"a": {}, "b": {}}
    assert alike({"a": ["h.0.w", "wte"], "b": ["t.h.0.w", "t.wte"]}) == {
        "a": {"h.0.w": "t.h.0.w", "wte": "t.wte"},
        "b": {},
    }


def test_the_merge_says_where_its_configuration_is_neither_parents(tmp_path):
    tied, untied = family(tmp_path / "t", 1, tie_word_embeddings=True), family(tmp_path / "u", 1)
    _, found = merge({"models": ["tied", "untied"]}, {"tied": tied["a"], "untied": untied["a"]}, tmp_path / "out")
    (told,) = [line for line in lines(found["notes"]) if "differ in" in line]
    assert told.endswith("the merge has what tied has, but tie_word_embeddings False")
