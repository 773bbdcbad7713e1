"""A part of a larger model merged with models of that part's size; all else is copied."""

import pytest
import torch
from small_family import CONFIG, family, merge, model, save, tensors
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import graft.merge
from graft.errors import CannotCombine, SettingsError
from graft.facts import facts_of
from graft.models import load

VISION = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`seeing` is a model of images and text, whose language model is near `base`, of which `a` and `b` were tuned."""
    root = tmp_path_factory.mktemp("family")
    made = family(root, 2)
    torch.manual_seed(5)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**CONFIG), image_token_id=47)
    seeing = LlavaForConditionalGeneration(config)
    near = model(4, near=load(made["base"]))
    seeing.model.language_model.load_state_dict(near.model.state_dict())
    seeing.lm_head.load_state_dict(near.lm_head.state_dict())
    return made | {"seeing": save(seeing, root / "seeing")}


def inner(folder):
    """Prefix of the language model's tensors as they are stored, and the same of its head."""
    names = tensors(folder)
    body = next(n for n in names if n.endswith("layers.0.mlp.up_proj.weight")).removesuffix(
        "layers.0.mlp.up_proj.weight"
    )
    head = next(n for n in names if n.endswith("lm_head.weight"))
    return body, head


METHODS = {
    "linear": ({"models": {"seeing": 1, "a": 3}}, lambda s, a, b: (s + 3 * a) / 4),
    "task_arithmetic": (
        {"base": "seeing", "models": {"a": 0.5, "b": -0.25}}, lambda s, a, b: s + 0.5 * (a - s) - 0.25 * (b - s)
    ),
    "slerp": ({"models": ["seeing", "a"], "t": 0.0}, lambda s, a, b: s),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_language_model_inside_is_merged_and_all_else_copied(name, folders, tmp_path):
    settings, formula = METHODS[name]
    body, head = inner(folders["seeing"])
    part = {body: "model.", head: "lm_head.weight"}
    out, found = merge({"method": name, "part": part} | settings, folders, tmp_path / "out")
    before, a, b = (tensors(folders[n]) for n in ("seeing", "a", "b"))
    assert out.keys() == before.keys()
    merged = 0
    for tensor, value in out.items():
        there = (
            "lm_head.weight"
            if tensor == head
            else tensor.replace(body, "model.", 1)
            if tensor.startswith(body)
            else None
        )
        if there is None:
            assert torch.equal(value, before[tensor])
        else:
            merged += 1
            torch.testing.assert_close(value, formula(before[tensor], a[there], b[there]), rtol=1e-5, atol=1e-6)
    assert merged == len(a)
    assert found["notes"]["copied"] == f"{len(before) - merged} tensors of seeing"
    assert type(load(tmp_path / "out")).__name__ == "LlavaForConditionalGeneration"


def test_a_part_of_two_models_alike(folders, tmp_path):
    part = ["model.layers.1.", "model.norm."]
    out, _ = merge({"method": "linear", "models": ["a", "b"], "part": part}, folders, tmp_path / "out")
    a, b = tensors(folders["a"]), tensors(folders["b"])
    for name, value in out.items():
        expected = (a[name] + b[name]) / 2 if name.startswith(tuple(part)) else a[name]
        torch.testing.assert_close(value, expected)


def test_a_part_may_have_more_tokens_than_the_model_it_is_merged_with(folders, tmp_path):
    """`seeing` with two tokens more, one of them for images: rows that the text model lacks stay as they are."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**CONFIG | {"vocab_size": 50}),
        image_token_id=49,
    )
    large = save(LlavaForConditionalGeneration(config), tmp_path / "large", words=50)
    body, head = inner(large)
    settings = {"method": "linear", "models": ["large", "a"], "part": {body: "model.", head: "lm_head.weight"}}
    here = folders | {"large": large}
    with pytest.raises(CannotCombine, match="different vocabularies"):
        merge(settings, here, tmp_path / "no")
    out, _ = merge(settings | {"vocabulary": "base", "anyway": True}, here, tmp_path / "out")
    before, a = tensors(large), tensors(folders["a"])
    for name, there in ((f"{body}embed_tokens.weight", "model.embed_tokens.weight"), (head, "lm_head.weight")):
        torch.testing.assert_close(out[name][:48], (before[name][:48] + a[there]) / 2)
        torch.testing.assert_close(out[name][48:], before[name][48:])
    assert load(tmp_path / "out").config.text_config.vocab_size == 50


def test_what_cannot_be_found_is_named(folders, tmp_path):
    body, _ = inner(folders["seeing"])
    with pytest.raises(
        CannotCombine, match=r"seeing has no tensor that begins with 'language\.'; its tensors begin with"
    ):
        merge({"method": "linear", "models": ["seeing", "a"], "part": ["language."]}, folders, tmp_path / "1")
    with pytest.raises(CannotCombine, match=r"a lacks \d+ tensors of the part that is merged"):
        merge({"method": "linear", "models": ["seeing", "a"], "part": [body]}, folders, tmp_path / "2")
    with pytest.raises(CannotCombine, match=r"differ in shape|lacks"):
        merge({"method": "linear", "models": ["seeing", "a"]}, folders, tmp_path / "3")
    with pytest.raises(SettingsError, match="expected prefixes of names in `part`"):
        graft.merge.VERB.parse({"method": "linear", "models": ["a", "b"], "part": []})
    narrow = folders | {"n": save(model(0, intermediate_size=20), tmp_path / "n")}
    with pytest.raises(CannotCombine, match=r"mlp.down_proj.weight is \[16, 24\] in seeing, \[16, 20\] in n"):
        merge({"method": "linear", "models": ["seeing", "n"], "part": {body: "model."}}, narrow, tmp_path / "4")


def test_a_recipe_lets_a_part_through(folders):
    verb = graft.merge.VERB
    settings = verb.parse({"method": "linear", "models": ["seeing", "a"], "part": {"model.language_model.": "model."}})
    assert verb.check(settings, {n: facts_of(folders[n]) for n in ("seeing", "a")}) == []
