"""Who runs next where an ensemble speculates: a draft, how many tokens it writes, whether the others add drafts; or
nobody drafts, and all members run for each token, as in plain decoding.

What gives most tokens for the cost follows from how often each member's drafts are kept, row by row, since a batch
lasts as long as its slowest row, and from what drafting and plain decoding were timed to cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median

import numpy as np

BLOCKS = (1, 2, 4, 8, 16)
"""Lengths of a block that are thought of."""
THREAD, ACCELERATOR = 12, 256
"""Tokens that are read in about twice the time of one, since weights are fetched once for all: by each thread of
a CPU (from members of 5M to 25M parameters), by an accelerator (a guess)."""
DEARER = 1.05
"""How much more the same reading is taken to cost where it is for drafts, until both were timed; a batch that is timed
tries it as if it cost the same."""
UNEVEN, MOST = 0.015, 3
"""How much longer the slowest row takes than its shares say, for each draft of a round (up to so many), and each time
that the rows are doubled: the more drafts may be kept or not, the more chance there is in it."""
FIRST = 3
"""Tokens of a batch before it drafts: the prompts are read, and it is seen who would draft well."""
EACH = 8
"""Tokens of a row after which the turns are chosen anew; sooner after a change."""
HALF = 16
"""Tokens of a row after which what a draft said counts half."""
WAIT = 32
"""Plain tokens after drafts that did not pay until they are tried again; each time twice as many."""
STAY = 0.9
"""What another plan has to last, of the time of the one under way, to be taken instead."""
HORIZON = 24
"""Tokens that are looked ahead."""
SLOPE, FEWER, MORE = 4, 2, 5
"""How many times longer than a token prompts must be that say what reading costs, and how many times fewer tokens, or
more, than guessed may cost as much again: more where a run of a small member is mostly what is done once for all."""
TIMED = 4
"""Rounds of each kind whose times are remembered."""


@dataclass(frozen=True)
class Plan:
    """`draft` writes `block` tokens, then each other member reads them; with `relay` it adds a draft of its own behind
    them, which costs it no further run (alternate proposals, Fu et al. 2025). A block of none: plain decoding."""

    draft: int
    block: int
    relay: bool = False

    def turns(self, members: int) -> Iterator[tuple[int, bool]]:
        """Which member runs, in order, and whether it drafts."""
        yield from [(self.draft, True)] * self.block
        yield from ((other, self.relay) for other in range(members) if other != self.draft)


PLAIN = Plan(0, 0)


@dataclass(frozen=True)
class Script:
    """What plans do until HORIZON drafts are judged: in `[plans, runs]` the `member` that runs, how many tokens of a
    row it `reads` (0: no run), how many drafts were judged `before`; in `[plans, HORIZON]` whose each draft is."""

    member: np.ndarray
    reads: np.ndarray
    before: np.ndarray
    by: np.ndarray

    def rates(self, sizes: Sequence[float], shares: np.ndarray, rows: int, free: float) -> np.ndarray:
        """Expected tokens for the cost `[rows, plans]`, where of a row the members' drafts are kept with these `shares
        [rows, members]`, and so many `rows` are read together.

        Counted from a token that was not kept to the next one, after which everything begins anew: that many tokens,
        and what the runs in between cost: a run costs the member's size, and as much again for `free` tokens that it
        reads.
        """
        kept = shares[:, self.by].cumprod(-1)
        alive = np.concatenate([np.ones_like(kept[..., :1]), kept], -1)
        costs = np.asarray(sizes)[self.member] * (self.reads > 0) * (1 + rows * self.reads / free)
        reached = np.take_along_axis(alive, np.broadcast_to(self.before, (len(shares), *self.before.shape)), -1)
        return alive[..., :-1].sum(-1) / (reached * costs).sum(-1)


@cache
def script(members: int, plans: tuple[Plan, ...]) -> Script:
    """What these plans do in an ensemble of so many members."""
    runs, by = zip(*(_runs(members, plan) for plan in plans), strict=True)
    longest = max(map(len, runs))
    table = np.array([[*each, *[(0, 0, 0)] * (longest - len(each))] for each in runs])
    return Script(table[..., 0], table[..., 1], table[..., 2], np.array(by))


def _runs(members: int, plan: Plan) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Of one plan: member, tokens and drafts judged before, of each run; and whose each draft is."""
    runs: list[tuple[int, int, int]] = []
    drafted: list[int] = []
    seen, judged = [0] * members, 0
    while judged < HORIZON:
        for member, drafts in plan.turns(members):
            reads = len(drafted) + 1 - seen[member] - (not drafts)
            runs.append((member, reads, min(judged, HORIZON)))
            seen[member] += reads
            drafted += [member] * drafts
            judged = max(judged, min(*seen, len(drafted)))
    return runs, drafted[:HORIZON]


@dataclass
class Turns:
    """Chooses plans for so many rows. `sizes`: what a run of each member costs; `drafts`: members that may begin;
    `free`: tokens that cost as much again; `block`: fixed, or None for what is best. `clock`: seconds, by which rounds
    are timed; without one plans, and with them which drafts are drawn, follow from the text alone."""

    sizes: Sequence[float]
    drafts: Sequence[int]
    free: float
    rows: int = 1
    block: int | None = None
    clock: Callable[[], float] | None = None
    drafted: int = field(default=0, init=False)
    held: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._tried, self._kept = (np.zeros((self.rows, len(self.sizes))) for _ in range(2))
        self._plan, self._rounds, self._left, self._next = PLAIN, 0, 0, 1
        self._prompts: _Timed | None = None
        self._timed: dict[bool, deque[_Timed]] = {drafting: deque(maxlen=TIMED) for drafting in (False, True)}
        self._since, self._wait, self._barred = 0.0, WAIT, 0
        self._begun: tuple[float, dict[int, int]] = 0.0, {}

    def plan(self, left: Mapping[int, int]) -> Plan:
        """The turns to take now, where so many tokens are `left` to be written in each row."""
        most = max(left.values())
        written = self._left - most if self._rounds else 0
        if not self._rounds or written >= self._next:
            faded = 0.5 ** (written / HALF)
            self._tried, self._kept = self._tried * faded, self._kept * faded
            self._change(self._best(left), written, left)
            self._left = most
        self._rounds += 1
        if self.clock is not None:
            self._since = self.clock()
        return self._plan

    def _change(self, plan: Plan, written: int, left: Mapping[int, int]) -> None:
        """Goes on with this plan, after so many tokens `written` by the one before."""
        self._next = min(2 * self._next, EACH) if plan == self._plan and self._rounds >= FIRST else 1
        if not self._plan.block:
            self._barred -= written
        elif not plan.block:
            self._barred, self._wait = self._wait, 2 * self._wait
            self._timed[True].clear()
        if plan.block and not self._plan.block and self.clock is not None:
            self._begun = self.clock(), dict(left)
        self._plan = plan

    def saw(self, judged: Iterable[tuple[int, int, bool]]) -> None:
        """In which rows whose drafts were judged, and whether they were kept."""
        for row, member, held in judged:
            self._tried[row, member] += 1
            self._kept[row, member] += held
            self.drafted += 1
            self.held += held

    @property
    def looks(self) -> bool:
        """Whether to look, in this round without drafts, which ones would be kept: seldom after the first ones."""
        return self.block is None and (self._rounds <= EACH or self._rounds % 4 == 0)

    def would(self, rows: Sequence[int], kept: np.ndarray) -> None:
        """With what probability a draft of each member would have been kept in these rows: `kept [rows, members]`."""
        self._tried[rows] += 1
        self._kept[rows] += kept

    def took(self, drafting: bool, runs: Sequence[tuple[int, int]], rows: int) -> None:
        """The round that was planned is over: whether it drafted, and which members ran for so many rows, and read how
        many tokens of each."""
        if self.clock is None or not runs:
            return
        timed = _Timed(self.clock() - self._since, runs, rows)
        if self._rounds > 1:
            self._timed[drafting].append(timed)
        elif not drafting:
            self._prompts = timed

    def shares(self, rows: Sequence[int]) -> np.ndarray:
        """How often each member's drafts are kept in each of these rows, `[rows, members]`: no member, and no row, is
        far from all of them before much of it was seen."""
        tried, kept = self._tried[rows], self._kept[rows]
        common = (kept.sum() + 2) / (tried.sum() + 3)
        members = (kept.sum(0) + 2 * common) / (tried.sum(0) + 2)
        every = (kept.sum(1) + 8 * common) / (tried.sum(1) + 8)
        return np.clip(members * every[:, None] / common, 0.0, 0.99)

    def dearer(self) -> float:
        """How much more the same reading costs where it is for drafts: as timed, and before that as it is taken to."""
        guess = DEARER if self.rows == 1 or self.clock is None else 1.0
        plain, drafting = ([timed.seconds / self._cost(timed) for timed in self._timed[kind]] for kind in (False, True))
        count = min(len(plain), len(drafting))
        return (guess + count * median(drafting) / median(plain)) / (1 + count) if count else guess

    def _cost(self, timed: _Timed) -> float:
        return sum(self.sizes[member] * (1 + timed.rows * reads / self.free) for member, reads in timed.runs)

    def _learn(self) -> None:
        """How many tokens cost as much again, from the time that the prompts took beside that of plain tokens. They
        were read first, when everything is slow: so it is too few rather than too many."""
        plain = self._timed[False]
        if self._prompts is None or not plain:
            return
        slower = self._prompts.seconds / median(timed.seconds for timed in plain)
        first, then = (timed.rows * max(reads for _, reads in timed.runs) for timed in (self._prompts, plain[0]))
        if slower > 1 and first > SLOPE * then:
            found = (first - slower * then) / (slower - 1)
            self.free = min(max(found, self.free / FEWER), self.free * MORE)
        self._prompts = None

    def _best(self, left: Mapping[int, int]) -> Plan:
        if self.block is not None:
            plans = tuple(Plan(draft, self.block, True) for draft in self.drafts)
            return plans[self._shortest(plans, self._lasts(left, plans))]
        if (self.rows > 1 and self._rounds < FIRST) or self._barred > 0 or self._slow(left):
            return PLAIN
        self._learn()
        plans = tuple(Plan(draft, block, relay) for draft in self.drafts for block in BLOCKS for relay in (True, False))
        drafts = np.array([plan.block - 1 + plan.relay * (len(self.sizes) - 1) for plan in plans])
        uneven = 1 + UNEVEN * np.log2(len(left)) * drafts.clip(1, MOST)
        lasts = self._lasts(left, plans) * self.dearer() * uneven
        plain = max(left.values()) * sum(self.sizes) * (1 + len(left) / self.free)
        place = self._shortest(plans, lasts)
        return PLAIN if plain <= lasts[place] else plans[place]

    def _shortest(self, plans: Sequence[Plan], lasts: np.ndarray) -> int:
        """Which of these plans lasts shortest, where the one under way has a start: after a change of who begins, a
        member runs twice in a row, and the others have the more to read."""
        return int((lasts * np.array([STAY if plan == self._plan else 1.0 for plan in plans])).argmin())

    def _slow(self, left: Mapping[int, int]) -> bool:
        """Whether drafting, since it began, has taken longer than plain decoding for what it wrote, counted half as the
        mean of the rows, half as the slowest, which may be so by chance; and half of the drafts under way, of which
        each member but one has added one where all do."""
        plain = self._timed[False]
        if not self._plan.block or self.clock is None or not plain:
            return False
        begun, before = self._begun
        done = [before[row] - count for row, count in left.items()]
        under_way = len(self.sizes) - 1 if self._plan.relay else 1
        written = (under_way + min(done) + sum(done) / len(done)) / 2
        return self.clock() - begun > written * median(timed.seconds for timed in plain)

    def _lasts(self, left: Mapping[int, int], plans: tuple[Plan, ...]) -> np.ndarray:
        """What it costs to write all that is left by each of these plans: as much as in the slowest row."""
        rates = script(len(self.sizes), plans).rates(self.sizes, self.shares(list(left)), len(left), self.free)
        return (np.array(list(left.values()))[:, None] / rates).max(0)


@dataclass(frozen=True)
class _Timed:
    """A round: how many `seconds` it took that members ran for so many `rows`, each reading so many tokens of each."""

    seconds: float
    runs: Sequence[tuple[int, int]]
    rows: int
