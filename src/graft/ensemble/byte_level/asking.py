"""Texts that are read at the same time: each says what it needs before it goes on, and that is read in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from graft.ensemble.byte_level.cover import Told
from graft.ensemble.byte_level.leaf import Leaf

if TYPE_CHECKING:
    from graft.ensemble.byte_level.forest import Forest

T = TypeVar("T")
Found = tuple[Leaf, Told]


class Ask(NamedTuple):
    """What a text needs before it goes on: new `leaves`, each behind a known one or one before it, and what comes
    behind the tokens `alone`. Where something is read, so is what it will need later, `more` (which is asked only
    then), as far as other texts need as much, or up to `room` leaves of the text in all."""

    leaves: Sequence[Leaf] = ()
    alone: Sequence[int] = ()
    more: Callable[[], Sequence[Leaf]] = tuple
    room: int = 0


Reading = Generator[Ask, list[Found], T]
"""A text that is read: it yields what it needs, is given the leaves (and as much more as was read) with what follows
them, and returns a result."""


class Lacking:
    """What must be known before a text goes on: `leaves` that were not read, by their identity, and what comes behind
    the tokens `alone`."""

    def __init__(self) -> None:
        self.leaves: dict[int, Leaf] = {}
        self.alone: list[int] = []


class Wanted:
    """New `leaves` that a text needs; `twins`: of leaves that were not read what they will be, `again`: of leaves that
    the model can read no further behind the same with fewer tokens before it."""

    def __init__(self) -> None:
        self.leaves: list[Leaf] = []
        self.twins: dict[int, tuple[Leaf, Leaf]] = {}
        self.again: dict[int, tuple[Leaf, Leaf]] = {}

    def add(self, above: Leaf | None, token: int) -> Leaf:
        """A new leaf."""
        self.leaves.append(Leaf(above, token))
        return self.leaves[-1]

    def keep(self, found: Sequence[Found]) -> None:
        """Note what has been found of the first leaves, in order, which may be others of the same sequences."""
        read = {id(leaf): each for leaf, each in zip(self.leaves, found, strict=False)}
        for leaf, made in self.again.values():
            if made.told is not None or id(made) in read:
                leaf.again = read[id(made)][0] if id(made) in read else made
        for leaf, made in self.twins.values():
            if id(made) in read:
                leaf.twin = read[id(made)]


def together(forest: Forest, readings: Sequence[Reading[T]]) -> list[T]:
    """The results of readings, what all of them need at a time read in one pass."""
    results: dict[int, T] = {}
    waiting: dict[int, tuple[Reading[Any], Ask]] = {}
    _go_on(results, waiting, {number: (reading, None) for number, reading in enumerate(readings)})
    while waiting:
        asked = dict(waiting)
        waiting.clear()
        found = _answered(forest, [ask for _, ask in asked.values()])
        given = zip(asked.items(), found, strict=True)
        _go_on(results, waiting, {number: (reading, own) for (number, (reading, _)), own in given})
    return [results[number] for number in range(len(readings))]


def _go_on(results: dict[int, T], waiting: dict[int, tuple[Reading[T], Ask]], given: dict[int, Any]) -> None:
    """Each reading up to its next need or its end, by their numbers."""
    for number, (reading, found) in given.items():
        try:
            waiting[number] = reading, reading.send(found)
        except StopIteration as end:
            results[number] = end.value


def _answered(forest: Forest, asks: Sequence[Ask]) -> list[list[Found]]:
    """The leaves that each asks for with what follows them; one that several ask for is read once."""
    alone = {token for ask in asks for token in ask.alone if forest.reader.guess(token) is None}
    if not alone and not any(ask.leaves for ask in asks):
        return [[] for _ in asks]
    needs = Counter(leaf.row for ask in asks for leaf in ask.leaves)
    wanted = _filled(asks, needs)
    guesses = _behind_starts(forest, sorted(alone), needs)
    first: dict[tuple[int, int], Leaf] = {}
    instead: dict[int, Leaf] = {}
    for leaf in (leaf for leaves in (guesses, *wanted) for leaf in leaves):
        leaf.parent = instead.get(id(leaf.parent), leaf.parent)
        instead[id(leaf)] = first.setdefault((id(leaf.parent), leaf.token), leaf)
    told = {id(leaf): (leaf, each) for leaf, each in forest.tell(list(first.values()))}
    forest.reader.learn({leaf.token: told[id(instead[id(leaf)])][1] for leaf in guesses})
    return [[told[id(instead[id(leaf)])] for leaf in leaves] for leaves in wanted]


def _filled(asks: Sequence[Ask], needs: Counter[int]) -> list[list[Leaf]]:
    """The leaves that each asks for, and more where its tree would only be padded; counted in `needs` of each tree."""
    longest = max(needs.values(), default=0)
    wanted = []
    for ask in asks:
        more = ask.more()
        more = more[: max(0, max(longest, ask.room) - needs[more[0].row])] if more else ()
        needs.update(leaf.row for leaf in more)
        wanted.append([*ask.leaves, *more])
    return wanted


def _behind_starts(forest: Forest, tokens: Sequence[int], needs: Counter[int]) -> list[Leaf]:
    """Leaves of tokens behind nothing but a start, in the trees that have fewest others to read."""
    made = []
    for token in tokens:
        row = min(range(len(forest)), key=needs.__getitem__)
        needs[row] += 1
        made.append(Leaf(forest.root(row)[0], token))
    return made
