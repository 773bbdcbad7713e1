import math

import pytest
from tiny import settings

from graft.train.schedule import rate


def rates(steps, **given):
    return [rate(step, steps, settings(learning_rate=1.0, **given)) for step in range(steps)]


def test_warmup_rises_linearly_to_the_peak():
    assert rates(10, warmup=4, schedule="constant") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_warmup_below_one_is_a_share_of_the_steps():
    assert rates(10, warmup=0.4, schedule="constant") == rates(10, warmup=4, schedule="constant")


def test_linear_falls_to_the_final_rate():
    assert rates(6, warmup=2, schedule="linear", final_rate=0.2) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_cosine_is_half_a_cosine_behind_the_warmup():
    expected = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates(8, warmup=0, schedule="cosine") == pytest.approx(expected)


def test_wsd_is_level_and_then_straight_down():
    assert rates(8, warmup=0, schedule="wsd", decay=4) == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rates(8, warmup=0, schedule="wsd", decay=0.5) == rates(8, warmup=0, schedule="wsd", decay=4)


def test_cosine_falls_to_the_final_rate():
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates(8, warmup=0, schedule="cosine", final_rate=0.2) == pytest.approx(expected)


def test_wsd_falls_to_the_final_rate():
    expected = [1, 1, 1, 1, 1, 0.8, 0.6, 0.4]
    assert rates(8, warmup=0, schedule="wsd", decay=4, final_rate=0.2) == pytest.approx(expected)


def test_constant_knows_no_final_rate():
    assert rates(4, warmup=0, schedule="constant", final_rate=0.2) == [1, 1, 1, 1]
