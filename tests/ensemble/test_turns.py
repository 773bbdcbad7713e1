"""Who runs next is what gives most tokens for the cost."""

import numpy as np
import pytest
import torch

from graft.ensemble.turns import EACH, PLAIN, Costs, Plan, Turns

FREE = 48


def costs(*sizes, timed=False):
    return Costs([(size / 10, size) for size in sizes], FREE, timed)


def chosen(turns, rows=1):
    """The plan behind the first turns."""
    for _ in range(PLAIN + 1):
        plan = turns.plan(rows)
    return plan


def simulated(plan, sizes, shares, rows, tokens=4000):
    """Tokens for the cost of texts in which a draft is kept by a throw of a coin."""
    generator = torch.Generator().manual_seed(0)
    made, cost = 0, 0.0
    while made < tokens:
        seen, drafted, judged, alive = [0] * len(sizes), [], 0, True
        while alive:
            for members, drafts in plan.turns(len(sizes)):
                for member in members:
                    reads = len(drafted) + 1 - seen[member]
                    cost += sizes[member] * (1 + rows * reads / FREE)
                    seen[member] += reads
                    drafted += [member] if drafts else []
                while alive and judged < min(*seen, len(drafted)):
                    alive = bool(torch.rand((), generator=generator) < shares[drafted[judged]])
                    made, judged = made + 1, judged + 1
                if not alive:
                    break
    return made / cost


@pytest.mark.parametrize("relay", [True, False])
@pytest.mark.parametrize(("draft", "block"), [(0, 1), (0, 4), (1, 2)])
def test_the_expected_rate_is_the_rate_of_many_texts(draft, block, relay):
    plan, sizes, shares = Plan(draft, block, relay), [1.0, 3.0, 2.0], [0.6, 0.7, 0.5]
    cost = lambda members, reads: sum(sizes[m] * (1 + 2 * n / FREE) for m, n in zip(members, reads, strict=True))  # noqa: E731
    expected = plan.rate(3, cost, shares)
    assert expected == pytest.approx(simulated(plan, sizes, shares, 2), rel=0.03)


def test_the_plain_ensemble_writes_a_token_for_a_run_of_each_member():
    rate = Plan(0, 0).rate(2, lambda members, reads: sum([1.0, 3.0][m] for m in members) * max(reads), [0.5, 0.5])
    assert rate == pytest.approx(1 / 4)
    assert list(Plan(0, 0).turns(2)) == [([0, 1], False)]


def test_it_begins_plainly_and_stays_so_where_drafts_are_not_kept():
    turns = Turns(3, costs(1.0, 1.0, 1.0), [0, 1, 2])
    for _ in range(200):
        assert turns.plan(8).block == 0
        turns.saw([0.05, 0.1, 0.0], 8, 0, 0)


def test_drafting_that_does_not_pay_ends_and_begins_again_where_members_agree():
    turns = Turns(2, costs(1.0, 1.0), [0, 1])
    turns.saw([0.9, 0.9], 100, 0, 0)
    assert chosen(turns).block > 0
    for _ in range(20 * EACH):
        turns.plan(1)
        turns.saw([0.0, 0.0], 1, 1, 0)
    assert turns.plan(1).block == 0
    for _ in range(10 * EACH):
        turns.plan(1)
        turns.saw([0.95, 0.95], 1, 0, 0)
    assert turns.plan(1).block > 0


def test_of_equal_members_all_draft_and_a_small_one_drafts_blocks():
    assert chosen(Turns(2, costs(1.0, 1.0), [0, 1])).relay
    small = Turns(2, costs(1.0, 20.0), [0, 1])
    for _ in range(4):
        small.saw([1.0, 1.0], EACH, EACH, EACH)
    assert chosen(small).draft == 0
    assert chosen(small).block >= 8


def test_a_named_draft_and_a_given_block_are_kept():
    turns = Turns(2, costs(1.0, 1.0), [1], 5)
    turns.saw([1.0, 0.0], 100, 100, 100)
    assert (turns.drafted, turns.held) == (100, 100)
    assert turns.plan(1) == Plan(1, 5, True)


def test_turns_follow_what_is_kept_lately():
    turns = Turns(2, costs(1.0, 10.0), [0])
    chosen(turns)
    for _ in range(20):
        turns.saw([1.0, 1.0], EACH, EACH, EACH)
        turns.plan(1)
    long = turns.plan(1).block
    for _ in range(20):
        turns.saw([0.0, 1.0], EACH, EACH, 0)
        turns.plan(1)
    assert turns.plan(1).block <= 1 < long


def test_turns_that_were_timed_say_what_turns_cost_of_which_sizes_know_nothing():
    truth, found = np.array([30.0, 15.0, 5.0, 20.0]), costs(0.01, 0.03, timed=True)
    other = Costs(found.sizes, FREE, timed=False)
    turns = [([0, 1], [1, 1]), ([0], [3]), ([1], [2]), ([0], [1]), ([1], [5])]
    for members, reads in turns * 30:
        found.took(members, reads, 8, float(np.array(other._parts(members, reads, 8)) @ truth))
    found.learn()
    for members, reads in [*turns, ([0], [4]), ([1], [8])]:
        seconds = float(np.array(other._parts(members, reads, 8)) @ truth)
        # all four are drawn towards one factor
        assert found(members, reads, 8) == pytest.approx(seconds, rel=0.1)


def test_one_slow_turn_hardly_counts_and_without_a_clock_none_does():
    timed, untimed = costs(0.01, timed=True), costs(0.01)
    before = untimed([0], [1], 1)
    for each in (timed, untimed):
        for seconds in [*[0.02] * 20, 20.0]:
            each.took([0], [1], 1, seconds)
        each.learn()
    assert timed([0], [1], 1) == pytest.approx(0.02, rel=0.1)
    assert untimed([0], [1], 1) == before
