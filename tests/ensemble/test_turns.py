"""Who runs next is what gives most tokens for the cost."""

import pytest
import torch

from graft.ensemble.turns import EACH, Plan, Turns

FREE = 48


def simulated(plan, sizes, shares, rows, tokens=4000):
    """Tokens for the cost of texts in which a draft is kept by a throw of a coin."""
    generator = torch.Generator().manual_seed(0)
    made, cost = 0, 0.0
    while made < tokens:
        seen, drafted, judged, alive = [0] * len(sizes), [], 0, True
        while alive:
            for member, drafts in plan.turns(len(sizes)):
                reads = len(drafted) + 1 - seen[member] - (0 if drafts else 1)
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
    assert plan.rate(sizes, shares, 2, FREE) == pytest.approx(simulated(plan, sizes, shares, 2), rel=0.03)


def test_without_drafts_that_are_kept_it_is_the_plain_ensemble_and_never_slower():
    sizes = [1.0, 1.0, 1.0]
    turns = Turns(sizes, [0, 1, 2], FREE)
    for _ in range(200):
        turns.saw([(turns.plan(8).draft, False)])
    plan = turns.plan(8)
    assert (plan.block, plan.relay) == (1, False)
    plain = 1 / sum(size * (1 + 8 / FREE) for size in sizes)
    assert plan.rate(sizes, turns.shares(), 8, FREE) == pytest.approx(plain, rel=0.05)


def test_of_equal_members_all_draft_and_a_small_one_drafts_blocks():
    assert Turns([1.0, 1.0], [0, 1], FREE).plan(1).relay
    small = Turns([1.0, 20.0], [0, 1], FREE)
    for _ in range(4):
        small.saw([(0, True)] * EACH)
    assert small.plan(1).draft == 0
    assert small.plan(1).block >= 8


def test_a_named_draft_and_a_given_block_are_kept():
    turns = Turns([1.0, 1.0], [1], FREE, 5)
    turns.saw([(0, True)] * 100)
    assert turns.plan(1) == Plan(1, 5, True)


def test_turns_follow_what_is_kept_lately():
    turns = Turns([1.0, 10.0], [0], FREE)
    for _ in range(20):
        turns.saw([(0, True)] * EACH)
        turns.plan(1)
    long = turns.plan(1).block
    for _ in range(20):
        turns.saw([(0, False)] * EACH)
        turns.plan(1)
    assert turns.plan(1).block == 1 < long
