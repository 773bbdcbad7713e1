"""Who runs next where an ensemble speculates: a draft, how many tokens it writes, whether the others add drafts.

Which turns give most tokens for their cost follows from how often each member's drafts are kept, and from what runs
cost: as they were timed, or as the members' sizes say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Lengths of a block that are thought of."""
UNEVEN = 1.25
"""How much better drafting must be than the plain ensemble in a batch, which lasts as long as its slowest row."""
PLAIN = 3
"""Turns of the plain ensemble before a batch drafts: the prompts are read, and it is seen who would draft well."""
FIRST, EACH = 4, 16
"""Tokens of each row after which the turns are chosen anew, at first and in the end, each time after twice as many, or
as soon as the plain ensemble would have written them; what older ones said counts half each time."""
HORIZON = 16
"""Tokens that are looked ahead."""
FORGOTTEN = 0.02
"""What is less likely is not looked at."""
TURN = 5e-4
"""Seconds that judging is taken to last until turns are timed."""
TIMED = 48
"""Turns that are remembered with the time they took."""
DRAWN = 0.2
"""Timed turns that the guess counts for."""

Cost = Callable[[Sequence[int], Sequence[int]], float]
"""What a turn of these members costs that read so many tokens of a row each."""


@dataclass(frozen=True)
class Plan:
    """`draft` writes `block` tokens, then each other member reads them; with `relay` it adds a draft of its own behind
    them, which costs it no further run (alternate proposals, Fu et al. 2025). A block of none is the plain ensemble."""

    draft: int
    block: int
    relay: bool = False

    def turns(self, members: int) -> Iterator[tuple[list[int], bool]]:
        """Which members run, in order, those of a turn at the same time; and whether they draft."""
        if not self.block:
            yield list(range(members)), False
            return
        yield from [([self.draft], True)] * self.block
        others = [other for other in range(members) if other != self.draft]
        yield from (([other], True) for other in others) if self.relay else [(others, False)] if others else ()

    def rate(self, members: int, cost: Cost, shares: Sequence[float]) -> float:
        """Expected tokens a row for the cost, where a member's draft is kept with its share of `shares`.

        Counted from a token that was not kept to the next one, after which everything begins anew: that many tokens,
        and what the runs in between cost.
        """
        if not self.block:
            return 1 / cost(range(members), [1] * members)
        drafted: list[int] = []
        seen, judged = [0] * members, 0
        tokens, spent, alive = 0.0, 0.0, 1.0
        while judged < HORIZON and alive > FORGOTTEN:
            for numbers, drafts in self.turns(members):
                spent += alive * cost(numbers, [len(drafted) + 1 - seen[member] for member in numbers])
                for member in numbers:
                    seen[member] = len(drafted) + 1
                    drafted += [member] * drafts
                while judged < min(*seen, len(drafted)):
                    tokens, alive = tokens + alive, alive * shares[drafted[judged]]
                    judged += 1
        return tokens / spent


@dataclass
class Costs:
    """Seconds that turns take: so many for the calls of each member's layers, so many for its weights to be fetched, so
    many for each token that it reads, and so many for the drafts to be judged. They are guessed; turns that were timed
    say by how much each of the four is more or less (least squares, drawn towards one common factor).

    `sizes`: of each member the first two; `free`: tokens that take as long as the weights; `timed`: whether turns are
    timed, so that plans, and with them which drafts are drawn, depend on the clock.
    """

    sizes: Sequence[tuple[float, float]]
    free: float
    timed: bool = True

    def __post_init__(self) -> None:
        self._timed: deque[tuple[list[float], float]] = deque(maxlen=TIMED)
        self._factors = [1.0] * 4

    def __call__(self, members: Sequence[int], reads: Sequence[int], rows: int) -> float:
        """Of a turn of these members that read so many tokens in each of so many rows."""
        parts = self._parts(members, reads, rows)
        return sum(factor * part for factor, part in zip(self._factors, parts, strict=True))

    def _parts(self, members: Sequence[int], reads: Sequence[int], rows: int) -> list[float]:
        always = weights = tokens = 0.0
        for member, count in zip(members, reads, strict=True):
            call, fetch = self.sizes[member]
            always, weights, tokens = always + call, weights + fetch, tokens + fetch * rows * count / self.free
        return [always, weights, tokens, TURN]

    def took(self, members: Sequence[int], reads: Sequence[int], rows: int, seconds: float) -> None:
        """A turn took so long."""
        if self.timed:
            self._timed.append((self._parts(members, reads, rows), seconds))

    def learn(self) -> None:
        """Take the turns that were timed into account."""
        if not self._timed:
            return
        parts, took = (np.array(each) for each in zip(*self._timed, strict=True))
        total = parts.sum(1)
        parts, took = parts / total[:, None], took / total
        common = float(np.median(took))
        # once in a while a turn takes long for reasons that have nothing to do with it
        off = parts.T @ (took.clip(max=2 * common) - common)
        found = common + np.linalg.solve(parts.T @ parts + DRAWN * np.eye(4), off)
        self._factors = found.clip(common / 8, common * 8).tolist()


@dataclass
class Turns:
    """Chooses plans for so many `members`. `drafts`: those that may begin; `block`: fixed, or None for what is best."""

    members: int
    costs: Costs
    drafts: Sequence[int]
    block: int | None = None
    tried: list[float] = field(init=False)
    kept: list[float] = field(init=False)
    drafted: int = field(default=0, init=False)
    held: int = field(default=0, init=False)
    _plan: Plan | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.tried, self.kept = [0.0] * self.members, [0.0] * self.members
        self._begun, self._seen, self._after = 0, 0, FIRST
        self._expected, self._plain, self._spent, self._trust = 0.0, 0.0, 0.0, 1.0

    def plan(self, rows: int) -> Plan:
        """The turns to take now with so many rows."""
        self._begun += 1
        if self.block is None and rows > 1 and self._begun <= PLAIN:
            return Plan(self.drafts[0], 0)
        if self._plan is None or self._seen >= self._after * rows or self._spent >= self._after * self._plain:
            self._compare(rows)
            self.costs.learn()
            self._after = FIRST if self._plan is None else min(EACH, 2 * self._after)
            self._plan, self._seen, self._spent = self._best(rows), 0, 0.0
            self.tried, self.kept = [n / 2 for n in self.tried], [n / 2 for n in self.kept]
        return self._plan

    def took(self, members: Sequence[int], reads: Sequence[int], rows: int, seconds: float | None) -> None:
        """A turn of these members that read so many tokens of each row took so long; None: it read the prompts."""
        if seconds is not None:
            self._spent += self.costs(members, reads, rows)
            self.costs.took(members, reads, rows, seconds)

    def _compare(self, rows: int) -> None:
        """Drafts that were kept less often than expected make all plans that draft less trusted, for some time: what is
        kept and what is not often come one behind the other."""
        self._trust = (1 + self._trust) / 2
        if self._plan is not None and self._plan.block and self._spent:
            self._trust = min(self._trust, self._seen / rows / self._spent / self._expected)

    def saw(self, shares: Sequence[float], tokens: int, drafted: int, held: int) -> None:
        """So many tokens were written, before which so many drafts were judged and held: of each member's drafts there,
        had it written them, these `shares` would have been kept."""
        self.tried = [tried + tokens for tried in self.tried]
        self.kept = [kept + tokens * share for kept, share in zip(self.kept, shares, strict=True)]
        self.drafted, self.held, self._seen = self.drafted + drafted, self.held + held, self._seen + tokens

    def shares(self) -> list[float]:
        """How often each member's drafts are kept: nobody is far from all of them before much of him was seen."""
        common = (sum(self.kept) + 2) / (sum(self.tried) + 3)
        return [(kept + 2 * common) / (tried + 2) for kept, tried in zip(self.kept, self.tried, strict=True)]

    def _best(self, rows: int) -> Plan:
        shares = self.shares()

        def cost(members: Sequence[int], reads: Sequence[int]) -> float:
            return self.costs(members, reads, rows)

        @cache
        def rate(plan: Plan) -> float:
            return plan.rate(self.members, cost, shares)

        plain = Plan(self.drafts[0], 0)
        relays = (True, False) if self.block is None else (True,)
        best = max((self._block(draft, relay, rate) for draft in self.drafts for relay in relays), key=rate)
        self._expected, self._plain = rate(best), 1 / rate(plain)
        pays = self._expected * self._trust * self._plain > (UNEVEN if rows > 1 else 1)
        return best if pays or self.block is not None else plain

    def _block(self, draft: int, relay: bool, rate: Callable[[Plan], float]) -> Plan:
        """The best length of a block: longer ones as long as they are better."""
        blocks = BLOCKS if self.block is None else (self.block,)
        best = Plan(draft, blocks[0], relay)
        for block in blocks[1:]:
            longer = Plan(draft, block, relay)
            if rate(longer) <= rate(best):
                break
            best = longer
        return best
