"""Sizes come near what was asked; impossible pairs are refused; the formula counts what the class has."""

import pytest

from graft.adapters.trial import skeleton
from graft.errors import CannotCombine
from graft.pretrain import VERB
from graft.pretrain.architectures import (
    TABLE,
    Shape,
    build,
    config_for,
    count_parameters,
    default_heads,
    dimensions,
    estimate_parameters,
    positions_for,
)
from graft.train.estimate import cpu_flops

IDS = {"bos": 1, "eos": 2, "pad": 0}


@pytest.mark.parametrize(("architecture", "positions"), list(TABLE))
@pytest.mark.parametrize("size", [1_000_000, 3_000_000, 12_000_000])
def test_a_model_of_a_size_has_about_that_many_parameters(architecture, positions, size):
    hidden, layers, heads = dimensions(size, architecture, positions, 2000, 256)
    config = config_for(architecture, positions, Shape(hidden, layers, heads, 2000, 256, 0.0, IDS))
    real = count_parameters(config)
    # widths go in steps of 32 channels: in the smallest models a step is a tenth of the size
    assert real == pytest.approx(size, rel=0.12)
    assert estimate_parameters(architecture, positions, hidden, layers, heads, 2000, 256) == pytest.approx(
        real, rel=0.06
    )


def test_a_model_has_as_many_parameters_as_its_configuration_says():
    config = config_for("decoder", "rotary", Shape(64, 2, 2, 300, 32, 0.0, IDS))
    assert count_parameters(config) == sum(p.numel() for p in build(config).parameters())


@pytest.mark.parametrize(("architecture", "positions"), list(TABLE))
def test_what_is_planned_of_a_configuration_is_what_it_says_when_it_is_made(architecture, positions):
    raw = {"data": "d", "architecture": architecture, "positions": positions, "hidden": 64, "layers": 2, "length": 32}
    settings = VERB.parse({**raw, "tokenizer": {"size": 300}})
    planned = VERB.facts(settings, {}, "key").config
    heads = default_heads(64)
    made = config_for(architecture, positions, Shape(64, 2, heads, 300, 32, 0.0, IDS))
    assert {key: getattr(made, key, None) for key in planned} == planned
    assert [name for name, _ in skeleton(planned).named_parameters()] == [n for n, _ in build(made).named_parameters()]


def test_positions_that_no_class_carries_are_refused_with_those_there_are():
    with pytest.raises(CannotCombine, match="no encoder with alibi positions; for encoder there are: rotary, learned"):
        positions_for("encoder", "alibi")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"data": "d"}, "expected `size` (such as 5M), or `hidden` and `layers`, found neither"),
        ({"data": "d", "hidden": 32}, "expected `size` (such as 5M), or `hidden` and `layers`"),
        ({"data": "d", "size": "1M", "hidden": 32, "layers": 2}, "either `size`"),
        ({"data": "d", "size": "1M", "architecture": "encoder", "positions": "alibi"}, "no encoder with alibi"),
        ({"data": "d", "size": "1M", "architecture": "encoder", "objective": "causal"}, "does not go with"),
        ({"data": "d", "hidden": 32, "layers": 2, "heads": 5}, "expected `heads` to divide"),
        ({"data": "d", "size": "1M", "heads": 4}, "either `size` or `heads`, found both"),
        ({"data": "d", "size": "50k"}, "the nearest has"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(raw, message):
    (problem, *_) = VERB.check(VERB.parse(raw), {})
    assert message in problem


def test_the_estimate_knows_parameters_disk_memory_and_time():
    estimate = VERB.estimate(VERB.parse({"data": "d", "size": "3M", "budget": "2M tokens"}), {})
    assert estimate.parameters == pytest.approx(3_000_000, rel=0.1)
    assert estimate.disk_bytes == 4 * estimate.parameters
    assert estimate.memory_bytes > 16 * estimate.parameters
    assert estimate.seconds == pytest.approx(6 * estimate.parameters * 2e6 / cpu_flops())


@pytest.mark.parametrize("hidden", [32, 48, 100, 320, 511, 512, 672, 1000, 4096])
def test_heads_fill_the_width_and_are_about_as_wide_as_is_useful(hidden):
    heads = default_heads(hidden)
    assert hidden % heads == 0
    if hidden in (32, 320, 512, 4096):
        assert hidden // heads == (32 if hidden < 512 else 64)


def test_a_model_with_the_tokenizer_of_one_that_does_not_exist_yet_knows_its_size():
    first = VERB.facts(VERB.parse({"data": "d", "size": "1M", "tokenizer": {"size": 700}}), {}, "a")
    settings = VERB.parse({"data": "d", "size": "400k", "architecture": "encoder", "tokenizer": {"of": "first"}})
    assert VERB.check(settings, {"first": first}) == []
    second = VERB.facts(settings, {"first": first}, "b")
    assert second.parameters == pytest.approx(400_000, rel=0.1)
    assert (second.vocabulary, second.initialisation) == (first.vocabulary, "of:b")
    assert first.initialisation == "of:a"
