"""Several adapters in one model: switched, stacked, averaged; each row of a batch its own; all in one folder."""

import pytest
import torch
import transformers as hf

from graft import models
from graft.adapters import adapters_of, adopt
from graft.errors import RequestError, UnknownName
from graft.tune import lora

from .families import family, inputs, logits, moved
from .test_space import points

KINDS = {"low": "lora", "wide": "houlsby", "keys": "prefix", "tokens": "prompt", "factors": "ia3"}


@pytest.fixture
def many(tmp_path):
    """A model with an adapter of each kind, all of them trained."""

    def make(model_name="llama", kinds=KINDS):
        family(model_name).save_pretrained(tmp_path / "base")
        model = models.load(tmp_path / "base")
        torch.manual_seed(0)  # what starts at random is the same in any order of the tests
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


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "t5", "llama4", "deepseek"])
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


def test_a_layer_that_orders_rows_and_tokens_otherwise_is_told():
    """In Longformer queries are made from tokens of rows, and outputs are rows of tokens."""
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.LongformerConfig(**sizes, intermediate_size=24, max_position_embeddings=64, attention_window=[4])
    model = hf.LongformerForMaskedLM(config).eval()
    adopt(model, points("houlsby"))
    logits(model)
    adopt(model, points("parallel_adapter", on=["attention"]), "beside")
    with pytest.raises(RequestError, match="in one order of rows and tokens"):
        logits(model)


def test_rows_are_not_told_apart_by_single_experts():
    sizes = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
    model = hf.NllbMoeForConditionalGeneration(hf.NllbMoeConfig(**sizes, encoder_sparse_step=1, num_experts=2)).eval()
    stack = adopt(model, points("lora"), "low")
    with (
        pytest.raises(RequestError, match=r"experts\.expert_0\.fc1, an expert, which reads tokens of all rows"),
        stack.each_row(["low", None]),
    ):
        pass
    adopt(model, points("pfeiffer"), "wide")
    with torch.no_grad(), stack.each_row(["wide", None]):
        logits(model)


def test_a_second_adapter_is_trained_over_a_frozen_first(many):
    model = many(kinds={"first": "lora"})
    adapters_of(model).use("first")
    before = logits(model)
    stack = adopt(model, points("lora"), "second")
    assert torch.equal(logits(model), before)
    assert [name for name, _ in stack.active] == ["first", "second"]
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"second"}


def low_rank(name="llama", **more):
    """A model with two low-rank adapters that have learned something; the second is the active one."""
    model = family(name)
    for each in ("one", "two"):
        adopt(model, lora.points(lora.Settings(rank=2, **more)), each)
        moved(model)
    return model.eval()


def with_gradient(model, **more):
    """Logits by the way that training takes."""
    with torch.enable_grad():
        return model(**(inputs(model) | more)).logits.detach()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_takes_a_shorter_way_to_the_same_logits(name, rows):
    model = low_rank(name)
    stack = adapters_of(model)
    given = inputs(model, rows=rows)
    for active in ("one", ["one", "two"], {"one": 0.3, "two": -2.0}, None):
        stack.use(active)
        with torch.no_grad():
            short = model(**given).logits
        # products are taken in another layout; T5 does not scale its logits
        torch.testing.assert_close(short, with_gradient(model, **given), rtol=1e-5, atol=5e-5)
    used = [junction.light for junction in stack.junctions.values()]
    assert used == [None] * len(used)  # nothing is active any more
    stack.use("two")
    with torch.no_grad():
        model(**given)
    assert all(junction.light for junction in stack.junctions.values())


def test_the_shorter_way_sees_weights_that_changed_and_moved():
    model = low_rank()
    stack = adapters_of(model)
    with torch.no_grad():
        before = model(**inputs(model)).logits
        for parameter in stack.sites["two"].parameters():
            parameter.mul_(2)
        changed = model(**inputs(model)).logits
        for parameter in stack.sites["two"].parameters():
            parameter.data = 2 * parameter.data
        moved_on = model(**inputs(model)).logits
        for site in stack.sites["two"].values():  # as weights in parts do that are put together anew
            site.up = torch.nn.Parameter(2 * site.up)
        replaced = model(**inputs(model)).logits
    assert not torch.allclose(before, changed)
    assert not torch.allclose(changed, moved_on)
    assert not torch.allclose(moved_on, replaced)
    torch.testing.assert_close(replaced, with_gradient(model), rtol=1e-5, atol=1e-5)


def test_what_is_dropped_in_training_is_dropped_without_gradients_too():
    model = low_rank(dropout=0.5)
    with torch.no_grad():
        still = model(**inputs(model)).logits
        model.train()
        torch.manual_seed(0)
        dropped = model(**inputs(model)).logits
    torch.manual_seed(0)
    torch.testing.assert_close(dropped, with_gradient(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dropped, still, atol=1e-4)


def test_other_types_than_the_layers_take_the_long_way():
    model = low_rank().to(torch.bfloat16)
    adapters_of(model).sites.float()
    with torch.no_grad():
        short = model(**inputs(model)).logits
    torch.testing.assert_close(short, with_gradient(model), rtol=1e-2, atol=1e-2)
    assert short.dtype == torch.bfloat16


def test_what_is_no_adapter_no_weight_and_no_list_of_rows_is_told(many):
    model = many(kinds={"low": "lora"})
    stack = adapters_of(model)
    for weight in (float("nan"), "half"):
        with pytest.raises(RequestError, match="expected a finite number as the weight of low, found"):
            stack.use({"low": weight})
    with (
        pytest.raises(RequestError, match="expected a list with a name for each row, found 'low'"),
        stack.each_row("low"),
    ):
        pass
    with pytest.raises(RequestError, match="expected a point or more for the adapter 'more', found none"):
        adopt(model, [], "more")
    with pytest.raises(RequestError, match="without dots and slashes for an adapter, found 'a/b'"):
        adopt(model, points("lora"), "a/b")
    assert stack.active == []


def test_a_folder_of_adapters_says_nowhere_on_which_machine_it_was_made(many, tmp_path):
    model = many(kinds={"low": "lora"})
    model.save_pretrained(tmp_path / "low")
    assert str(tmp_path) not in (tmp_path / "low" / "config.json").read_text()
