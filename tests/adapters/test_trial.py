"""Adapters tried on a skeleton: what no call of the model reaches is told, and what is called is counted."""

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


def test_what_cannot_be_tried_without_weights_is_told_later():
    assert problems(config_of("mixtral"), points("prefix")) == []
    with torch.device("meta"):
        model = hf.MixtralForCausalLM(CLASSES["mixtral"][1](**CLASSES["mixtral"][2]))
    assert counted(model, points("prefix")) == "told once its weights are loaded"
