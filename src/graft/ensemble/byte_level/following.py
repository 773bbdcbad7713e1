"""A known text gone through byte by byte, what its bytes will need being read before they are come to, in few passes.

One token sequence leads through the text: at first the one that the tokenizer makes. Each pass reads it on by some
tokens, and with them the sequences beside it that the part of the text read before will need: they are found by going
through that part with what stands for them until they are read. Where that shows that another sequence will be
likelier, it is the other one that is read on. All of this is guessing what to read, which changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from graft.data.encode import encode
from graft.ensemble.byte_level.asking import Found, Lacking, Reading
from graft.ensemble.byte_level.cover import State, Told
from graft.ensemble.byte_level.forest import Forest
from graft.ensemble.byte_level.leaf import Leaf

if TYPE_CHECKING:
    from graft.ensemble.byte_level.byte_model import ByteModel

TOKENS = 96
"""Tokens of the leading sequences of all texts that a pass reads on, about."""
LEAST, MOST = 12, 32
"""Of one text at least and at most."""
AHEAD = 1
"""So many passes' tokens may have been read beyond what is sure of a text."""
SIDES = 64
"""Sequences beside the leading one that are looked for at once."""
LEADING = 0.25
"""Share of the mass with which a sequence still leads."""

Note = Callable[[int, State], None]
"""Is given the place of a byte and the state behind it."""


class Following:
    """A text on its way: `state` behind its first `done` bytes.

    `line`: leaves of the leading sequence with the byte at which each ends, from the last that ends by `done` on, which
    are held with what follows them; `tokens` go on behind the last.
    """

    def __init__(self, model: ByteModel, forest: Forest, state: State, data: bytes, note: Note):
        self.model, self.forest, self.state, self.data, self.note = model, forest, state, data, note
        self.done = 0
        self.line: list[tuple[int, Leaf, Told | None]] = []
        self.tokens: list[int] = []
        self.most = min(MOST, max(LEAST, TOKENS // len(forest)))

    def reading(self) -> Reading[State]:
        """The state at the end of the text."""
        self._lead(self.state, 0)
        lacking = Lacking()
        held: list[Lacking] = []  # what was read lives until the next byte is known
        while self.done < len(self.data):
            before, wanted = self.done, list(lacking.leaves.values())
            behind = self.line[-1][1].now, self.tokens[: self._room()]
            found = yield from self.forest.catch_up(wanted, behind, lacking.alone)
            self._read_on(found)
            held.append(lacking)
            front, reached, lacking = self._pass()
            held = held if self.done == before else []
            self._lead(front, reached)
        return self.state

    def _room(self) -> int:
        """How many tokens more are read ahead."""
        return max(1, min(self.most, AHEAD * self.most + 1 - len(self.line)))

    def _read_on(self, found: Sequence[Found]) -> None:
        """The first of the tokens have been read."""
        spelling = self.model.spelling
        for leaf, told in found:
            spelt = (spelling.first if leaf.depth == 1 else spelling.later)[leaf.token] or b""
            self.line.append((self.line[-1][0] + len(spelt), leaf, told))
        self.tokens = self.tokens[len(found) :]

    def _pass(self) -> tuple[State, int, Lacking]:
        """Go on through what has been read ahead; returns the state there, its byte, and what is to be read.

        Behind the first byte that something is lacking for, what stands for it is a guess: only to see what else is.
        """
        lacking, exact, here = Lacking(), True, self.state
        place = self.done
        stop = min(len(self.data), max(place + 1, self.line[-1][0]))
        while place < stop:
            here, sure = self.model.stepped(self.forest, here, self.data[place], lacking, exact)
            exact = exact and sure
            place += 1
            if exact:
                self.done, self.state = place, here
                self.note(place - 1, here)
            elif len(lacking.leaves) > SIDES:
                break
        return here, place, lacking

    def _lead(self, front: State, reached: int) -> None:
        """What leads on from the state behind so many bytes, which may be one of guesses."""
        while len(self.line) > 1 and self.line[1][0] <= self.done:
            self.line.pop(0)
        here = [leaf.now for end, leaf, _ in self.line if end <= reached][-1:]
        mass = sum([each.mass for each in front.open if here and each.leaf.now is here[0]])
        if self.done == len(self.data) or (self.tokens and mass > LEADING * front.total):
            return
        likely = max(front.open, key=lambda each: each.mass)
        begun = likely.node.read
        self.line = [(reached - len(begun), likely.leaf.now, None)]
        self.tokens = cut(self.model, begun + self.data[reached : reached + 8 * MOST], likely.leaf.depth == 0)


def cut(model: ByteModel, text: bytes, first: bool) -> list[int]:
    """Tokens that spell the text (or its beginning): the tokenizer's as far as they do, then the longest."""
    (ids,) = encode([text.decode(errors="replace")], model.tokenizer)
    made: list[int] = []
    done = 0
    for token in ids:
        spelt = (model.spelling.first if first and not made else model.spelling.later)[token]
        if not spelt or text[done : done + len(spelt)] != spelt:
            break
        made.append(token)
        done += len(spelt)
    while done < len(text) and len(made) < MOST:
        trie = model.reader.first if first and not made else model.reader.later
        found = trie.longest(text[done : done + 64])
        if found is None:
            break
        made.append(found[0])
        done += found[1]
    return made
