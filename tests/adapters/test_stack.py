"""Several adapters in one model: switched, stacked, averaged; each row of a batch its own; all in one folder."""

import pytest
import torch

from graft import models
from graft.adapters import adapters_of, adopt
from graft.errors import RequestError, UnknownName

from .families import family, inputs, logits, moved
from .test_space import points

KINDS = {"low": "lora", "wide": "houlsby", "keys": "prefix", "tokens": "prompt", "factors": "ia3"}


@pytest.fixture
def many(tmp_path):
    """A model with an adapter of each kind, all of them trained."""

    def make(model_name="llama", kinds=KINDS):
        family(model_name).save_pretrained(tmp_path / "base")
        model = models.load(tmp_path / "base")
        for name, how in kinds.items():
            stack = adopt(model, points(how), name, base=tmp_path / "base")
            moved(model, 0.3)
        stack.use(None)
        return model

    return make


def alone(model, name):
    with adapters_of(model).using(name):
        return logits(model)


def test_adapters_are_switched(many):
    model = many()
    bare = logits(model)
    seen = [alone(model, name) for name in KINDS]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(seen) for b in [bare, *seen[:i]])
    assert torch.equal(logits(model), bare)
    with pytest.raises(UnknownName, match="unknown adapter 'wde' \\(did you mean 'wide'\\?\\)"):
        adapters_of(model).use("wde")


def test_adapters_of_one_artifact_come_back_together(many, tmp_path):
    model = many()
    adapters_of(model).use({"low": 0.5, "keys": 1.0})
    expected = logits(model)
    model.save_pretrained(tmp_path / "all")
    loaded = models.load(tmp_path / "all")
    assert torch.equal(logits(loaded), expected)
    for name in KINDS:
        assert torch.equal(alone(loaded, name), alone(model, name))


def test_stacked_adapters_run_one_after_the_other(many):
    model = many(kinds={"language": "houlsby", "task": "houlsby"})
    stack = adapters_of(model)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 3, 24)
    stack.use(["language", "task"])
    both = layer(x)
    stack.use(None)
    h = layer(x)
    for name in ("language", "task"):
        h = stack.sites[name]["model/layers/0/feed_forward"](h, None)
    assert torch.allclose(both, h, atol=1e-6)


def test_averaged_adapters_are_the_mean_of_their_changes(many):
    model = many(kinds={"a": "lora", "b": "lora"})
    stack = adapters_of(model)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 16)
    outputs = {}
    for name, active in {"none": None, "a": "a", "b": "b", "mean": {"a": 0.5, "b": 0.5}}.items():
        stack.use(active)
        outputs[name] = layer(x)
    assert torch.allclose(outputs["mean"], (outputs["a"] + outputs["b"]) / 2, atol=1e-6)


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "t5"])
def test_each_row_of_a_batch_has_its_own_adapter(many, model_name):
    model = many(model_name)
    names = ["low", None, "keys", "wide", "tokens", "low", "factors"]
    batch = inputs(model, rows=len(names))
    with torch.no_grad(), adapters_of(model).each_row(names):
        together = model(**batch).logits
    for row, name in enumerate(names):
        with torch.no_grad(), adapters_of(model).using(name):
            one = model(**{key: value[row : row + 1] for key, value in batch.items()}).logits
        assert (together[row] - one[0]).abs().max() < 1e-5 * (1 + one.abs().max()), name  # float32, in another order


def test_rows_with_their_own_adapters_generate_as_alone(many):
    model = many()
    names = ["low", "tokens", None, "keys"]
    ids = inputs(model, rows=4)["input_ids"]
    for how in ({}, {"num_beams": 2}):
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None} | how
        with adapters_of(model).each_row(names):
            together = model.generate(ids, **options)
        for row, name in enumerate(names):
            with adapters_of(model).using(name):
                assert torch.equal(together[row], model.generate(ids[row : row + 1], **options)[0]), (name, how)


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_rows_of_low_rank_are_read_at_once_whatever_their_ranks(many, model_name):
    model = many(model_name, {"a": "lora"})
    stack = adapters_of(model)
    adopt(model, points("lora", rank=2, alpha=1), "b")
    moved(model)
    names = ["b", None, "a", "b"]
    batch = inputs(model, rows=4)
    with stack.each_row(names):
        slowly = model(**batch).logits  # with gradients, one after the other
        with torch.no_grad():
            together = model(**batch).logits
        assert any(junction.gathered is not None for junction in stack.junctions.values())
    assert torch.allclose(together, slowly, atol=1e-5)
    assert all(junction.gathered is None for junction in stack.junctions.values())


def test_rows_must_fit_the_names(many):
    model = many(kinds={"a": "lora"})
    with adapters_of(model).each_row(["a", None, "a"]), pytest.raises(RequestError, match="batch of 3 rows"):
        logits(model)


def test_a_second_adapter_is_trained_over_a_frozen_first(many):
    model = many(kinds={"first": "lora"})
    adapters_of(model).use("first")
    before = logits(model)
    stack = adopt(model, points("lora"), "second")
    assert torch.equal(logits(model), before)
    assert [name for name, _ in stack.active] == ["first", "second"]
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
