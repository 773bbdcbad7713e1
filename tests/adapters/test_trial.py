"""Adapters tried on a skeleton: what no call of the model reaches is told, and what is called is counted."""

import json

import pytest
import torch
import transformers as hf

from graft.adapters import adapters_of, adopt
from graft.adapters.table import counted
from graft.adapters.trial import problems, skeleton, trained

from .families import CLASSES, family, inputs
from .test_space import point, points


def config_of(name):
    cls, config, settings = CLASSES[name]
    return {**config(**settings).to_dict(), "architectures": [cls.__name__]}


def low_on(place):
    return [point(form="linear", on=[place], size=1)]


def test_layers_whose_weights_are_taken_without_a_call_are_refused():
    """A Mamba multiplies by the weight of `dt_proj` itself: what hangs on the layer never runs."""
    config = config_of("mamba")
    (wrong,) = problems(config, low_on("*.dt_proj"))
    assert wrong.startswith("MambaForCausalLM takes the weights of backbone.layers.0.mixer.dt_proj, backbone.layers.1.")
    assert "without calling these layers" in wrong
    assert problems(config, low_on("*.in_proj")) == []
    assert "takes the weights of" in problems(config, points("bitfit"))[0]
    shown = counted(skeleton(config), low_on("*.dt_proj"))
    assert shown == "not here: the model takes the weight of backbone.layers.0.mixer.dt_proj without calling it"


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "mamba"])
def test_what_is_let_by_gets_a_gradient_at_every_place(name):
    for place in ("linears", "feed_forward"):
        chosen = [point(form="bottleneck", on=[place], size=1)]
        assert problems(config_of(name), chosen) == []
        model = family(name)
        adopt(model, chosen)
        model(**inputs(model)).logits.square().sum().backward()
        assert all(p.grad is not None for p in adapters_of(model).parameters())


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bart"])
def test_learned_keys_are_counted_where_ids_are_looked_through_for_padding(name):
    whole = family(name)
    assert trained(config_of(name), points("prefix")) == adopt(whole, points("prefix")).count("adapter")


@pytest.mark.parametrize("options", [{"dora": True}, {"pissa": True}, {"dora": True, "rank": 99}])
def test_what_starts_from_weights_is_tried_without_them(options):
    config, chosen = config_of("llama"), points("lora", **options)
    if options.get("rank") == 99:
        assert "expected a rank of at most 16" in problems(config, chosen)[0]
        return
    assert problems(config, chosen, fold=True) == []
    assert trained(config, chosen) == adopt(family("llama"), chosen).count("adapter")


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "afmoe"])
def test_a_skeleton_of_experts_is_called(name):
    for method in ("prefix", "prompt"):
        assert trained(config_of(name), points(method)) == adopt(family(name), points(method)).count("adapter")
    assert "learned keys" in problems(config_of(name), points("prefix"), fold=True)[0]


def test_a_configuration_is_read_as_it_lies_on_disk():
    """A Mamba-2 has an infinity in it, for which JSON has no word."""
    config = hf.Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=2, vocab_size=60, state_size=4)
    said = json.loads(config.to_json_string()) | {"architectures": ["Mamba2ForCausalLM"]}
    assert problems(said, low_on("*.in_proj")) == []
    assert trained(said, low_on("*.in_proj")) is not None


def test_what_cannot_be_tried_without_weights_is_told_later():
    assert problems(config_of("dbrx"), points("prefix")) == []
    with torch.device("meta"):
        model = hf.DbrxForCausalLM(CLASSES["dbrx"][1](**CLASSES["dbrx"][2]))
    assert counted(model, points("prefix")) == "told once its weights are loaded"
