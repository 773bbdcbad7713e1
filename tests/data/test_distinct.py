"""A compact set says what Python's says."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.distinct import Distinct

numbers = st.integers(1, 2**64 - 1) | st.integers(1, 50) | st.integers(2**64 - 50, 2**64 - 1)


@settings(deadline=None)
@given(st.lists(numbers))
def test_a_number_is_new_once(given):
    ours, theirs = Distinct(bits=2), set()
    for number in given:
        assert ours.add(number) == (number not in theirs)
        theirs.add(number)
    assert len(ours) == len(theirs)


def test_it_keeps_what_it_holds_while_it_grows():
    draw = random.Random(0)
    given = [draw.getrandbits(64) for _ in range(50_000)]
    held = Distinct()
    assert all(held.add(number) for number in given)
    assert not any(held.add(number) for number in given)


def test_it_takes_less_than_a_third_of_pythons_set():
    held = Distinct()
    for number in range(1, 200_001):
        held.add(number * 0x9E3779B97F4A7C15 % 2**64)
    assert held.table.itemsize * len(held.table) / 200_000 < 30
