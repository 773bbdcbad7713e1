"""Who runs next is what gives most tokens for the cost; drafts that do not pay cost little, by any clock."""

import random

import numpy as np
import pytest
import torch

from graft.ensemble.turns import EACH, FIRST, PLAIN, Plan, Turns, script

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
                cost += sizes[member] * (reads > 0) * (1 + rows * reads / FREE)
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
    rates = script(3, (Plan(2, 1, True), plan)).rates(sizes, np.array([[0.1, 0.2, 0.3], shares]), 2, FREE)
    assert rates[1, 1] == pytest.approx(simulated(plan, sizes, shares, 2), rel=0.03)


class World:
    """Rows that are written by plans: each draft is kept by a throw of a coin, and rounds last what they cost here."""

    def __init__(self, turns, rows, length, share, seconds):
        self.turns, self.share, self.seconds = turns, share, seconds
        self.left, self.now, self.coin = dict.fromkeys(range(rows), length), 0.0, random.Random(0)
        self.drafting = 0

    def round(self):
        plan, rows = self.turns.plan(self.left), list(self.left)
        members = range(len(self.turns.sizes))
        first = self.now == 0
        runs = [(member, 2 if plan.block else 14 if first else 1) for member in members]
        self.now += self.seconds(plan, runs, len(rows))
        if not plan.block:
            self.turns.would(rows, np.full((len(rows), len(members)), self.share))
        self.drafting += plan.block > 0
        for row in rows:
            kept = 0
            while plan.block and kept < len(members) - 1 and self.coin.random() < self.share:
                kept += 1
            if plan.block:
                self.turns.saw(
                    [(row, plan.draft, True)] * kept + [(row, plan.draft, False)] * (kept < len(members) - 1)
                )
            self.left[row] -= kept + 1
            if self.left[row] <= 0:
                del self.left[row]
        self.turns.took(plan.block > 0, runs, len(rows))

    def run(self):
        while self.left:
            self.round()
        return self


def written(members, rows, share, dear, length=64):
    """A world in which a round without drafts takes a second, one with drafts `dear` of them."""
    world = World(None, rows, length, share, lambda plan, runs, rows: dear if plan.block else 1.0)
    world.turns = Turns([1.0] * members, list(range(members)), FREE, rows, clock=lambda: world.now)
    return world.run()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.6, 0.7, 0.8])
@pytest.mark.parametrize("dear", [1.5, 2.0, 2.5])
@pytest.mark.parametrize("members", [2, 4])
def test_drafts_that_do_not_pay_are_given_up_before_they_have_cost_a_twentieth(members, dear, share):
    for length in (64, 256):
        assert written(members, 8, share, dear, length).now <= 1.05 * length + 1


def test_drafts_that_pay_are_gone_on_with():
    quick = written(2, 8, 0.95, 1.1)
    assert quick.now < 64 / 1.3
    assert quick.drafting > 20


def test_what_did_not_pay_is_tried_again_ever_more_seldom():
    world = written(4, 8, 0.9, 4.5, length=1000)
    assert 0 < world.drafting < 40
    assert world.now < 1050


def test_without_drafts_that_are_kept_it_is_plain_decoding():
    for rows in (1, 8):
        turns, left = Turns([1.0, 1.0, 1.0], [0, 1, 2], FREE, rows), 1000
        for _ in range(100):
            plan, left = turns.plan(dict.fromkeys(range(rows), left)), left - 1
            turns.saw([(row, plan.draft, False) for row in range(rows)])
        assert plan == PLAIN


def test_a_slow_row_decides_for_a_batch():
    turns = Turns([1.0, 1.0], [0, 1], FREE, 2)
    for left in range(60, 30, -1):
        plan = turns.plan({0: left, 1: left})
        turns.would([0, 1], np.array([[1.0, 1.0], [0.0, 0.0]]))
    assert plan == PLAIN
    quick, slow = turns.shares([0, 1]).mean(1)
    assert quick > 0.6 > 0.4 > slow


def test_of_equal_members_all_draft_and_a_small_one_drafts_blocks():
    assert Turns([1.0, 1.0], [0, 1], FREE).plan({0: 50}).relay
    small = Turns([1.0, 20.0], [0, 1], FREE)
    for _ in range(4):
        small.saw([(0, 0, True)] * EACH)
    plan = small.plan({0: 50})
    assert plan.draft == 0
    assert plan.block >= 8


def test_a_named_draft_and_a_given_block_are_kept():
    turns = Turns([1.0, 1.0], [1], FREE, block=5)
    turns.saw([(0, 0, True)] * 100)
    assert turns.plan({0: 50}) == Plan(1, 5, True)


def test_turns_follow_what_is_kept_lately():
    turns, blocks = Turns([1.0, 10.0], [0], FREE), []
    for left in range(640, 0, -1):
        blocks.append(turns.plan({0: left}).block)
        turns.saw([(0, 0, left > 320)])
    assert blocks[300] >= 8
    assert blocks[-1] <= 1


def test_without_a_clock_plans_follow_from_what_was_kept_alone():
    slow, quick = (Turns([1.0, 1.0], [0, 1], FREE, 2) for _ in range(2))
    for left in range(60, 0, -1):
        plans = [turns.plan({0: left, 1: left}) for turns in (slow, quick)]
        assert plans[0] == plans[1]
        for turns in (slow, quick):
            turns.took(plans[0].block > 0, [(0, 1), (1, 1)], 2)
            turns.would([0, 1], np.full((2, 2), 0.8))


@pytest.mark.parametrize(("real", "learnt"), [(3 * FREE, 3 * FREE), (100 * FREE, 5 * FREE), (FREE / 20, FREE / 2)])
def test_prompts_say_how_many_tokens_cost_as_much_again_within_bounds(real, learnt):
    now = [0.0]
    turns = Turns([1.0, 1.0], [0, 1], FREE, 8, clock=lambda: now[0])
    for place, reads in enumerate((14, 1, 1, 1, 1)):
        turns.plan(dict.fromkeys(range(8), 60 - place))
        now[0] += 2 * (1 + 8 * reads / real)
        turns.took(False, [(0, reads), (1, reads)], 8)
    turns.plan(dict.fromkeys(range(8), 50))
    assert turns.free == pytest.approx(learnt)


def test_a_batch_drafts_as_soon_as_it_has_seen_what_would_be_kept():
    turns, left, blocks = Turns([1.0, 1.0], [0, 1], FREE, 8, clock=lambda: 0.0), 60, []
    while not blocks or not blocks[-1]:
        blocks.append(turns.plan(dict.fromkeys(range(8), left - len(blocks))).block)
        turns.would(range(8), np.full((8, 2), 1.0))
    assert len(blocks) == FIRST + 1


def test_who_begins_stays_the_same_for_members_that_are_kept_about_equally_often():
    turns, coin, begin = Turns([1.0] * 4, [0, 1, 2, 3], FREE, 8), random.Random(0), set()
    for left in range(200, 0, -1):
        plan = turns.plan(dict.fromkeys(range(8), left))
        turns.saw([(row, member, coin.random() < 0.85) for row in range(8) for member in range(4)])
        if left < 190:
            begin.add(plan.draft)
    assert len(begin) == 1
