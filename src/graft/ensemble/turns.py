"""Who runs next where an ensemble speculates: a draft, how many tokens it writes, whether the others add drafts.

Which turns give most tokens for their cost follows from how often each member's drafts were kept so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Lengths of a block that are thought of."""
THREAD, ACCELERATOR = 12, 256
"""Tokens that are read in about twice the time of one, since weights are fetched once for all: by each thread of
a CPU (from members of 5M to 25M parameters), by an accelerator (a guess)."""
UNEVEN = 1.25
"""How much better drafting must be than the plain ensemble in a batch, which lasts as long as its slowest row."""
EACH = 16
"""Drafts after which the turns are chosen anew; what older ones said counts half each time."""
HORIZON = 24
"""Tokens that are looked ahead."""
FORGOTTEN = 0.01
"""What is less likely is not looked at."""


@dataclass(frozen=True)
class Plan:
    """`draft` writes `block` tokens, then each other member reads them; with `relay` it adds a draft of its own behind
    them, which costs it no further run (alternate proposals, Fu et al. 2025). A block of one without relay is the plain
    ensemble."""

    draft: int
    block: int
    relay: bool

    def turns(self, members: int) -> Iterator[tuple[int, bool]]:
        """Which member runs, in order, and whether it drafts."""
        yield from [(self.draft, True)] * self.block
        yield from ((other, self.relay) for other in range(members) if other != self.draft)

    def rate(self, sizes: Sequence[float], shares: Sequence[float], rows: int, free: float) -> float:
        """Expected tokens a row for the cost, where a member's draft is kept with its share of `shares`.

        Counted from a token that was not kept to the next one, after which everything begins anew: that many tokens,
        and what the runs in between cost: a run costs the member's size, and as much again for `free` tokens that it
        reads.
        """
        drafted: list[int] = []
        seen, judged = [0] * len(sizes), 0
        tokens, cost, alive = 0.0, 0.0, 1.0
        while judged < HORIZON and alive > FORGOTTEN:
            for member, drafts in self.turns(len(sizes)):
                reads = len(drafted) + 1 - seen[member] - (not drafts)
                cost += alive * sizes[member] * (1 + rows * reads / free)
                seen[member] += reads
                drafted += [member] * drafts
                while judged < min(*seen, len(drafted)):
                    tokens, alive = tokens + alive, alive * shares[drafted[judged]]
                    judged += 1
        return tokens / cost


@dataclass
class Turns:
    """Chooses plans. `sizes`: what a run of each member costs; `drafts`: members that may begin; `free`: tokens
    that cost as much again; `block`: fixed, or None for what is best."""

    sizes: Sequence[float]
    drafts: Sequence[int]
    free: float
    block: int | None = None
    tried: list[float] = field(init=False)
    kept: list[float] = field(init=False)
    drafted: int = field(default=0, init=False)
    held: int = field(default=0, init=False)
    _plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.tried, self.kept = [0.0] * len(self.sizes), [0.0] * len(self.sizes)
        self._next = 0

    def plan(self, rows: int) -> Plan:
        """The turns to take now with so many rows."""
        if self.drafted >= self._next:
            self._plan, self._next = self._best(rows), self.drafted + EACH * rows
            self.tried, self.kept = [n / 2 for n in self.tried], [n / 2 for n in self.kept]
        return self._plan

    def saw(self, judged: Iterable[tuple[int, bool]]) -> None:
        """Whose drafts were judged, and whether they were kept."""
        for member, held in judged:
            self.tried[member] += 1
            self.kept[member] += held
            self.drafted += 1
            self.held += held

    def shares(self) -> list[float]:
        """How often each member's drafts are kept: nobody is far from all of them before much of him was seen."""
        common = (sum(self.kept) + 2) / (sum(self.tried) + 3)
        return [(kept + 2 * common) / (tried + 2) for kept, tried in zip(self.kept, self.tried, strict=True)]

    def _best(self, rows: int) -> Plan:
        blocks = BLOCKS if self.block is None else (self.block,)
        relays = (True, False) if self.block is None else (True,)
        plans = [Plan(draft, block, relay) for draft in self.drafts for block in blocks for relay in relays]
        shares = self.shares()
        needs = {True: 1.0, False: UNEVEN if rows > 1 else 1.0}
        return max(
            plans,
            key=lambda plan: plan.rate(self.sizes, shares, rows, self.free) / needs[plan.block == 1 and not plan.relay],
        )
