"""Folding gives an ordinary model of the same shapes that computes the same."""

import pytest
import torch

from graft import models
from graft.adapters import adapters_of, adopt, fold
from graft.adapters.folding import save_folded
from graft.errors import RequestError

from .families import family, logits, moved
from .test_space import point, points

TOLERANCE = 2e-5
"""Weights are rounded to float32 once more; activations here are around 1."""


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "options", [{}, {"dora": True}, {"pissa": True}, {"rslora": True, "on": ["query|qkv", "feed_forward"]}]
)
def test_lora_folds(model_name, options):
    model = family(model_name)
    names, kind = list(model.state_dict()), type(model)
    adopt(model, points("lora", **options))
    moved(model)
    expected = logits(model)
    assert fold(model) is model
    assert (list(model.state_dict()), type(model), adapters_of(model)) == (names, kind, None)
    assert (logits(model) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("model_name", "name"), [("gpt2", "bitfit"), ("bert", "bitfit"), ("llama", "ia3"), ("gpt2", "ia3")]
)
def test_biases_and_factors_fold(model_name, name):
    model = family(model_name)
    adopt(model, points(name))
    moved(model)
    expected = logits(model)
    assert (logits(fold(model)) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("composition", ["scaled", "gated"])
@pytest.mark.parametrize("form", ["bias", "scale"])
def test_what_multiplies_a_norm_folds_into_its_weight_too(form, composition):
    model = family("gpt2")
    adopt(model, [point(form=form, on=["biases"], insertion="after", composition=composition), *points("bitfit")])
    moved(model)
    expected = logits(model)
    assert (logits(fold(model)) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("form", ["bias", "scale"])
def test_what_stands_before_a_layer_folds_beside_what_stands_behind_it(form):
    model = family("gpt2")
    ahead = point(form=form, insertion="after", on=["before down", "before qkv"])
    adopt(model, [ahead, *points("lora"), *points("bitfit")])
    moved(model)
    expected = logits(model)
    assert (logits(fold(model)) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("composition", ["add", "scaled", "gated"])
@pytest.mark.parametrize("insertion", ["parallel", "after"])
def test_any_linear_point_at_a_single_layer_folds(insertion, composition):
    model = family("gpt2")
    adopt(model, [point(form="linear", insertion=insertion, composition=composition, on=["output", "up"], size=2)])
    moved(model)
    expected = logits(model)
    assert (logits(fold(model)) - expected).abs().max() < TOLERANCE


def test_stacked_and_weighted_adapters_fold_as_they_run():
    model = family("gpt2")
    for name in ("a", "b"):
        stack = adopt(model, points("lora"), name)
        moved(model)
    stack.use({"a": 0.25, "b": 0.75})
    expected = logits(model)
    assert (logits(fold(model)) - expected).abs().max() < TOLERANCE


def test_a_folded_folder_is_an_ordinary_model_and_the_adapted_one_stays(tmp_path):
    model = family("llama")
    adopt(model, points("lora"))
    moved(model)
    expected = logits(model)
    save_folded(model, tmp_path / "whole")
    whole = models.load(tmp_path / "whole")
    assert type(whole).__name__ == "LlamaForCausalLM"
    assert adapters_of(whole) is None
    assert (logits(whole) - expected).abs().max() < TOLERANCE
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("houlsby", "a bottleneck, which is not linear"),
        ("prefix", "learned keys"),
        ("prompt", "learned keys or tokens"),
    ],
)
def test_what_cannot_fold_says_so(name, words):
    model = family("gpt2")
    adopt(model, points(name))
    with pytest.raises(RequestError, match=words):
        fold(model)
    assert adapters_of(model) is not None


def test_a_sublayer_and_a_missing_bias_do_not_fold():
    model = family("llama")
    adopt(model, [point(form="linear", on=["feed_forward"], size=2)])
    with pytest.raises(RequestError, match="reads what another module reads"):
        fold(model)
    other = family("llama")
    adopt(other, [point(form="bias", insertion="after", on=["query"])])
    with pytest.raises(RequestError, match="no bias to fold into"):
        fold(other)


def test_shared_weights_do_not_fold():
    model = family("gpt2")
    adopt(model, [point(form="linear", on=["lm_head"], size=2)])
    with pytest.raises(RequestError, match="shares its weight"):
        fold(model)


def test_folding_twice_is_refused():
    model = family("llama")
    adopt(model, points("lora"))
    fold(model)
    with pytest.raises(RequestError, match="folded already"):
        fold(model)
