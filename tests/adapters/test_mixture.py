"""A mixture of experts reads each text twice, in every architecture, with a cache as without, beside other adapters."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

from graft.adapters import adapters_of, adopt, fold
from graft.adapters.folding import remove
from graft.adapters.mixture import Mixer
from graft.adapters.second_cache import readings
from graft.errors import RequestError, SettingsError, UnknownName

from .families import family, inputs, logits, moved
from .test_space import point, points


def mixed(model_name="llama", how=None, **options):
    """A model with the experts a and b and a mixture of them that has learned something."""
    model = family(model_name)
    for number, name in enumerate("ab"):
        torch.manual_seed(number)
        adopt(model, points("lora", **({"rank": 2 + number} | options)), name)
        moved(model, 0.2 * (number + 1))
    adopt(model, [point(form="mixture", on=["adapters"], of=["a", "b"], mixture=how)], "mix")
    moved(model, 2.0)
    return model


ALL = ["llama", "gpt2", "opt", "neox", "phi3", "mixtral", "mpt", "mamba", "bert", "modernbert", "albert"]
DECODERS = ["llama", "gpt2", "opt", "neox", "phi3", "mixtral", "mpt", "mamba"]
ELSEWHERE = {"mixtral": {"on": ["attention_linears"]}, "mamba": {"on": ["*.in_proj"]}}


@pytest.mark.parametrize("name", ALL)
def test_scalings_that_are_the_same_for_all_tokens_are_weights(name):
    model = mixed(name, {"softmax": False, "weight": 2.0}, **ELSEWHERE.get(name, {}))
    stack = adapters_of(model)
    last = stack.sites["mix"]["classifier"].layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.7, -0.4]))
    found = logits(model)
    stack.use({"a": 1.4, "b": -0.8})
    assert torch.allclose(found, logits(model), atol=1e-4)
    stack.use(None)
    assert not torch.allclose(found, logits(model), atol=1e-2)


@pytest.mark.parametrize("name", ALL)
def test_a_token_has_the_scalings_that_the_frozen_models_last_state_of_it_gives(name):
    model = mixed(name, {"layerwise": True, "depth": 2, "width": 8}, **ELSEWHERE.get(name, {}))
    stack, seen = adapters_of(model), []
    mixer = stack.sites["mix"]["classifier"]
    keep = Mixer.then
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixer, "then", lambda self, hidden: (keep(self, hidden), seen.append(self.scalings))[0])
        logits(model)
    stack.use(None)
    with torch.no_grad():
        states = model(**inputs(model), output_hidden_states=True).hidden_states[-1]
        expected = mixer.layers(states).view(*states.shape[:2], -1, 2).softmax(-1)
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert float(expected.std()) > 0.05


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_writes_with_a_cache_what_it_writes_without(name):
    model = mixed(name, {"layerwise": True}, **ELSEWHERE.get(name, {}))
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = inputs(model)["input_ids"]
    written = model.generate(ids, **how)
    assert torch.equal(written, model.generate(ids, use_cache=False, **how))
    adapters_of(model).use(None)
    assert not torch.equal(written, model.generate(ids, **how))


def test_both_readings_of_a_cache_are_cropped_reordered_and_repeated_together():
    model, ids = mixed(how={"layerwise": True}), inputs(family("llama"), rows=2, length=12)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :9], past_key_values=DynamicCache(config=model.config)).past_key_values
        assert all(len(readings(layer)) == 2 for layer in cache.layers)
        kept = copy.deepcopy(cache)
        lean = copy.copy(cache)
        lean.layers = [copy.copy(layer) for layer in cache.layers]
        model(ids[:, 9:], past_key_values=lean)  # a copy grows by itself
        cache.crop(-4)
        assert torch.allclose(model(ids[:, 5:], past_key_values=cache).logits, whole[:, 5:], atol=1e-5)
        kept.reorder_cache(torch.tensor([1, 0]))
        turned = model(ids.flip(0)[:, 9:], past_key_values=kept).logits
        assert torch.allclose(turned, whole.flip(0)[:, 9:], atol=1e-5)
        kept = model(ids[:1, :9], use_cache=True).past_key_values
        kept.batch_repeat_interleave(3)
        assert torch.allclose(model(ids[:1, 9:].expand(3, -1), past_key_values=kept).logits, whole[:1, 9:], atol=1e-5)


@pytest.mark.parametrize("beside", ["prefix", "prompt"])
@pytest.mark.parametrize("after", [False, True])
def test_a_mixture_stands_beside_learned_keys_and_tokens(beside, after):
    """Which are there in both readings."""
    model = mixed(how={"layerwise": True})
    stack = adapters_of(model)
    adopt(model, points(beside, length=3, **({"gate": False} if beside == "prompt" else {})), "front")
    moved(model, 0.5)
    stack.use(["mix", "front"] if after else ["front", "mix"])
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = inputs(model)["input_ids"]
    written = model.generate(ids, **how)
    assert torch.equal(written, model.generate(ids, use_cache=False, **how))
    both = logits(model)
    stack.use("mix")
    assert not torch.allclose(both, logits(model), atol=1e-3)


def test_mixtures_of_other_rows_are_read_beside_each_other():
    model = mixed(how={"layerwise": True})
    stack = adapters_of(model)
    adopt(model, [point(form="mixture", on=["adapters"], of=["b", "a"])], "other")
    moved(model, 2.0)
    alone = []
    for name in ("mix", "other"):
        stack.use(name)
        alone.append(logits(model))
    with stack.each_row(["other", "mix"]):
        each = logits(model)
    assert torch.allclose(each[0], alone[1][0], atol=1e-5)
    assert torch.allclose(each[1], alone[0][1], atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


def test_what_cannot_be_mixed_is_refused():
    def refused(words, error=RequestError, model_name="llama", experts=None, **how):
        model = family(model_name)
        for name, given in (experts or {"a": points("lora", rank=2), "b": points("lora", rank=2)}).items():
            adopt(model, given, name)
        with pytest.raises(error, match=words):
            adopt(model, [point(form="mixture", on=["adapters"], of=["a", "b"], **how)], "mix")

    lora = points("lora", rank=2)
    refused("a `top_k` of at most 2, the experts' number, found 3", mixture={"top_k": 3})
    refused("unknown adapter 'b'", UnknownName, experts={"a": lora})
    refused("b: expected a LoRA adapter as an expert, found DoRA", experts={"a": lora, "b": points("lora", dora=True)})
    refused("found PiSSA", experts={"a": lora, "b": points("lora", pissa=True)})
    refused("found the form bottleneck, inserted after", experts={"a": lora, "b": points("houlsby")})
    head = [point(form="linear", on=["lm_head"], size=2)]
    refused("b: expected an expert inside of the model's body, found one at lm_head", experts={"a": lora, "b": head})
    refused("found an encoder–decoder", model_name="t5")
    fused = points("lora", rank=2, on=["experts_down"])
    refused(
        "b: expected a LoRA adapter as an expert, found one beside",
        model_name="mixtral",
        experts={"a": lora, "b": fused},
    )
    with pytest.raises(RequestError, match="expected two adapters or more to mix, found a"):
        model = family("llama")
        adopt(model, lora, "a")
        adopt(model, [point(form="mixture", on=["adapters"])], "mix")


def test_a_mixture_does_not_fold_and_is_taken_out_without_a_trace():
    model = mixed()
    with pytest.raises(RequestError, match="has a mixture, which is not linear"):
        fold(model)
    stack = adapters_of(model)
    with pytest.raises(RequestError, match="mix is a mixture of a with others"):
        stack.drop("a")
    stack.drop("mix")
    remove(model)
    assert torch.equal(logits(model), logits(family("llama")))


def test_checkpointed_layers_of_which_a_mixture_was_taken_out_take_another_one():
    model = mixed()
    model.train()
    model.gradient_checkpointing_enable()
    before = [module.__dict__.get("_gradient_checkpointing_func") for module in model.model.modules()]
    model(**inputs(model)).logits.sum().backward()
    remove(model)
    assert [module.__dict__.get("_gradient_checkpointing_func") for module in model.model.modules()] == before
    for name in "ab":
        adopt(model, points("lora", rank=2), name)
        moved(model, 0.2)
    adopt(model, [point(form="mixture", on=["adapters"], of=["a", "b"])], "mix")
    moved(model, 2.0)
    found = []
    for change in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        change()
        model.zero_grad()
        model(**inputs(model)).logits.pow(2).sum().backward()
        found.append(adapters_of(model).sites["mix"]["classifier"].layers[-1].weight.grad.clone())
    torch.testing.assert_close(*found)
    assert float(found[0].abs().max()) > 0


@pytest.mark.parametrize("form", ["fusion", "mixture"])
def test_what_is_put_together_stands_where_it_is_and_once(form):
    for given, words in (
        ({"layers": "0:1"}, "takes no `layers`"),
        ({"dropout": 0.1}, "takes no `dropout`"),
        ({"of": ["a", "b", "a"]}, f"every adapter of a {form} once, found a, b, a"),
    ):
        with pytest.raises(SettingsError, match=words):
            point(form=form, on=["adapters"], **given)


def test_a_mixture_is_not_fused():
    model = mixed()
    adopt(model, points("lora", rank=2), "c")
    with pytest.raises(RequestError, match=r"mix is a mixture of experts.*fuse its experts, or leave it out"):
        adopt(model, [point(form="fusion", on=["adapters"], of=["mix", "c"])], "both")
    adopt(model, [point(form="fusion", on=["adapters"], of=["a", "c"])], "both")


def test_layers_that_are_called_by_themselves_or_do_not_read_every_token_are_refused():
    model = mixed("llama", {"layerwise": True})
    mixer = adapters_of(model).sites["mix"]["classifier"]
    mixer.then(torch.zeros(2, 3, 16))
    assert mixer.at(0, torch.zeros(6, 16), None).shape == (6, 2)  # some models read all rows as one
    with pytest.raises(RequestError, match=r"one that reads \[5, 16\] of \[2, 3\] tokens"):
        mixer.at(0, torch.zeros(5, 16), None)
    mixer.scalings = None
    with pytest.raises(RequestError, match="call the whole model, not a part of it"):
        model.model.layers[0].self_attn.q_proj(torch.zeros(1, 3, 16))
