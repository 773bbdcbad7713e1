"""Whose turn it is: by shares, evenly, in phases, and from the row's number alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.rows import ListRows
from graft.data.turns import Evenly, TaskRows, Turns, by_task, shares_of

SHARES = st.lists(st.floats(1e-4, 1), min_size=1, max_size=5)


def brute(shares, count):
    """Every turn's time, all sorted."""
    total = sum(shares)
    due = [((j + 0.5) / (s / total), k, j) for k, s in enumerate(shares) for j in range(int(count * s / total) + 2)]
    return [(k, j) for _, k, j in sorted(due)][:count]


@settings(max_examples=40, deadline=None)
@given(SHARES)
def test_turns_are_those_of_the_sorted_times(shares):
    turns = Evenly(shares)
    assert [turns(i) for i in range(1500)] == brute(shares, 1500)


@settings(max_examples=40, deadline=None)
@given(SHARES, st.integers(0, 5000))
def test_every_task_has_had_its_share_and_none_of_its_rows_is_left_out(shares, turn):
    turns = Evenly(shares)
    had = turns.before(turn)
    assert had.sum() == turn
    assert np.abs(had - turn * turns.shares).max() <= len(shares) / 2 + 1
    task, number = turns(turn)
    assert number == had[task]


def test_equal_shares_take_turns():
    assert [Evenly([1, 1, 1])(i)[0] for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_phase_goes_on_where_the_one_before_stood():
    turns = Turns([(4, [1, 0]), (3, [1, 2]), (1, [0, 1])])
    found = [turns(i) for i in range(10)]
    assert [task for task, _ in found[:4]] == [0] * 4
    assert [task for task, _ in found[7:]] == [1] * 3
    for task in (0, 1):
        numbers = [number for which, number in found if which == task]
        assert numbers == list(range(len(numbers)))


def test_shares_by_size_and_temperature():
    assert shares_of([10, 30], [1, 1], by_size=True, temperature=1) == pytest.approx([0.25, 0.75])
    assert shares_of([10, 30], [1, 1], by_size=False, temperature=1) == [0.5, 0.5]
    assert shares_of([10, 30], [3, 1], by_size=False, temperature=1) == pytest.approx([0.75, 0.25])
    assert shares_of([1, 16], [1, 1], by_size=True, temperature=2) == pytest.approx([0.2, 0.8])
    assert shares_of([1, 10**6], [1, 1], by_size=True, temperature=1e9) == pytest.approx([0.5, 0.5], abs=1e-6)


def numbered(count, name="x"):
    return ListRows([{name: np.array([i])} for i in range(count)], shuffle=False)


def test_a_batch_in_turn_is_of_one_task_and_a_mixed_one_of_all():
    parts = {"a": numbered(20), "b": numbered(30, "y")}
    in_turn = TaskRows(parts, Turns([(1, [1, 1])]), run=4)
    batches = [in_turn.collate([in_turn[i] for i in range(s, s + 4)]) for s in range(0, 16, 4)]
    assert [list(batch) for batch in batches] == [["a/x"], ["b/y"], ["a/x"], ["b/y"]]
    assert batches[2]["a/x"].flatten().tolist() == [4, 5, 6, 7]
    mixed = TaskRows(parts, Turns([(1, [1, 1])]))
    batch = by_task(mixed.collate([mixed[i] for i in range(4)]))
    assert batch["a"]["x"].tolist() == [[0], [1]]
    assert batch["b"]["y"].tolist() == [[0], [1]]
    assert len(mixed) == 50


def test_a_row_depends_on_its_number_alone():
    parts = {"a": ListRows([{"x": np.array([i])} for i in range(7)], seed=1), "b": numbered(5)}
    make = lambda: TaskRows(parts, Turns([(100, [3, 1]), (9, [1, 1])]))  # noqa: E731
    forwards, rows = [make()[i] for i in range(3000)], make()
    order = np.random.default_rng(0).permutation(3000)
    assert all(rows[int(i)] == forwards[int(i)] for i in order)
