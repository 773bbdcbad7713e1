"""A model over tokens as a model over bytes: exact probabilities of the next byte behind any bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from graft.data.encode import encode
from graft.ensemble.byte_level._shares import PROMOTED
from graft.ensemble.byte_level.asking import Found, Lacking, Reading, together
from graft.ensemble.byte_level.cover import (
    END,
    Born,
    Hypothesis,
    State,
    Told,
    again,
    chosen,
    fresh,
    grown,
    state_of,
    step_of,
)
from graft.ensemble.byte_level.following import Following, Note
from graft.ensemble.byte_level.forest import Forest
from graft.ensemble.byte_level.leaf import Leaf
from graft.ensemble.byte_level.reader import Reader
from graft.ensemble.byte_level.spelling import spelling_of
from graft.ensemble.configuration import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LIKELY, DRAFTED = 0.003, 16
"""Where a pass is made anyway, what the likely next bytes need is read ahead: probability of these, and how many."""
ROOM = 4
"""Tokens of a text that such a pass reads at least, if so many are likely."""
WINDOW = 16
"""Tokens before the end of a sequence from which it is cut anew, to see whether the tokenizer cuts it so."""


@dataclass(frozen=True)
class Cover:
    """Which token sequences count. `tokenisations`: `all` that spell the text, or `canonical` ones, those that the
    tokenizer makes. Exact where the others are 0, 0 and None. `drop`: the share of the probability at each byte whose
    sequences are not read; `join`: the share that may go on as the likeliest sequence that ends at the same byte does;
    `most`: complete sequences followed at most at each byte."""

    tokenisations: Literal["all", "canonical"] = "all"
    drop: float = 0.03
    join: float = 0.3
    most: int | None = 16


EXACT = Cover(drop=0.0, join=0.0, most=None)


Plan = tuple[list[Hypothesis], Sequence[Born], bool, float, float]
"""What is followed of a state one byte on: what goes on and what is complete, whether that stays unread (is rough), the
mass of all, and the log-probability of the byte."""


Step = tuple[State, bool, Lacking]
"""A state one byte on, whether all of it is known, and what is lacking."""


class ByteModel:
    """A causal language model and its tokenizer as a distribution over byte strings.

    It is p(bytes) = Σ p(tokens) over all token sequences that spell the bytes (Vieira et al. 2025; Phan et al. 2024),
    p over the tokens that write text and the end, renormalised. Of the sequences that end at a byte, the least likely,
    which hold at most the share `join`, are taken to go on as the likeliest of them does, and where all of them hold at
    most the share `drop`, as their last token alone would, until they become likely. The distribution of texts of n
    bytes then differs from the exact one by at most n max(`drop`, `join`) in total variation (while `most` leaves out
    no more), in practice by far less; it always sums to one. Raises CannotCombine for a
    tokenizer whose tokens have no bytes of their own.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        cover: Cover = EXACT,
        *,
        limit: int | None = None,
        name: str = "the model",
    ):
        told = getattr(model, "generation_config", None)
        ends = getattr(told, "eos_token_id", None)
        self.spelling = spelling_of(tokenizer, [ends] if isinstance(ends, int) else ends or [], name)
        limit = context_of(model.config.to_dict()) if limit is None else limit
        self.reader = Reader(model, self.spelling, limit=limit, name=name)
        self.cover, self.tokenizer = cover, tokenizer
        # what goes on as another one does must not be refused where that one is
        self._join = cover.join if cover.tokenisations == "all" else 0.0

    def begin(self, forest: Forest, rows: Sequence[int]) -> list[State]:
        """Before the first byte, in these trees."""
        return together(forest, [self.beginning(forest, row) for row in rows])

    def advance(self, forest: Forest, states: Sequence[State], data: Sequence[int]) -> list[State]:
        """Each state one byte on, what is new read in one go. A byte that the model cannot write changes nothing."""
        steps = [self._step(forest, *pair) for pair in zip(states, data, strict=True)]
        if all(sure for _, sure, _ in steps):
            return [after for after, _, _ in steps]
        readings = [self.advancing(forest, *each) for each in zip(states, data, steps, strict=True)]
        return together(forest, readings)

    def follow(
        self, forest: Forest, states: Sequence[State], texts: Sequence[bytes], notes: Sequence[Note]
    ) -> list[State]:
        """The state at the end of each known text; its note is given the state behind each of its bytes, in order."""
        readings = [self.following(forest, *each) for each in zip(states, texts, notes, strict=True)]
        return together(forest, readings)

    def chance(self, state: State, byte: int) -> float:
        """The log-probability of a byte behind a state."""
        return step_of(state, grown(state, byte).mass)

    def beginning(self, forest: Forest, row: int) -> Reading[State]:
        """The state before the first byte of a tree's text."""
        leaf, told = forest.root(row)
        first = told.trie.root
        open_ = [fresh(leaf, told, 1.0, 0.0)]
        for place in range(first.low, first.mid):
            log = told.log_at[place]
            found = yield from forest.read(leaf, told.trie.ids.item(place))
            open_.append(fresh(*found, math.exp(log), log))
        return state_of(open_)

    def advancing(self, forest: Forest, state: State, byte: int, step: Step) -> Reading[State]:
        """The state one byte on, of which the first `step` is made. Where another text must be read on, so is what this
        one will likely need next."""
        held: list[Lacking] = []  # what was read lives until the byte is known
        while True:
            after, sure, lacking = step
            held.append(lacking)
            leaves = list(lacking.leaves.values())
            yield from forest.need(leaves, lacking.alone, partial(self._likely, forest, after), ROOM)
            if sure:
                return after
            step = self._step(forest, state, byte)

    def following(self, forest: Forest, state: State, data: bytes, note: Note) -> Reading[State]:
        """The state at the end of a known text."""
        return Following(self, forest, state, data, note).reading()

    def _step(self, forest: Forest, state: State, byte: int, exact: bool = True) -> Step:
        """The state one byte on, whether all of it is known, and what is lacking; what is sure is kept in the state."""
        if byte in state.later:
            return state.later[byte], True, Lacking()
        lacking = Lacking()
        after, sure = self.stepped(forest, state, byte, lacking, exact)
        if sure and exact:
            state.later[byte] = after
        return after, sure, lacking

    def stepped(
        self, forest: Forest, state: State, byte: int, lacking: Lacking, exact: bool = True
    ) -> tuple[State, bool]:
        """The state one byte on, and whether all of it is known; what is not is noted as `lacking`."""
        known, sure, step = self._known(forest, state, byte, lacking, exact)
        return _next_state(state, known, step), sure

    def _likely(self, forest: Forest, state: State) -> list[Leaf]:
        """What must be read for the likeliest next bytes, as far as they are likely enough."""
        share, exact = 1.0, True
        found: list[Leaf] = []
        for _ in range(DRAFTED):
            nexts = state.next[:END]
            byte = int(nexts.argmax())
            share *= float(nexts[byte])
            if share < LIKELY or len(found) >= ROOM:
                break
            state, sure, lacking = self._step(forest, state, byte, exact)
            exact = exact and sure
            found += lacking.leaves.values()
        return found

    def _plan(self, state: State, byte: int) -> Plan:
        """What is followed of a state one byte on, before the model is asked."""
        cover = self.cover
        moved, born, mass = grown(state, byte)
        step = step_of(state, mass)
        if born and cover.tokenisations == "canonical":
            kept = [each for each in born if self._canonical(each)]
            if kept or moved:
                born, mass = kept, sum([each.mass for each in moved]) + sum([each.mass for each in kept])
        moved, born, rough = chosen(moved, born, mass, cover.drop, self._join, cover.most)
        return moved, born, rough, mass, step

    def _known(
        self, forest: Forest, state: State, byte: int, lacking: Lacking, exact: bool = True
    ) -> tuple[list[Hypothesis], bool, float]:
        """The hypotheses of what is followed one byte on, whether all of it is known, and the byte's log-probability.

        What is `lacking` is noted (of a state that is not `exact`, only behind what was read); what has become likely
        of what was not read is to be read.
        """
        moved, born, rough, mass, step = self._plan(state, byte)
        sure, likely = True, PROMOTED * mass
        for place, each in enumerate(moved):
            if each[6] and each[4] > likely:  # `rough`, `mass`
                if forest.recall(each.leaf):
                    moved[place] = again(each, *_twin(each.leaf), _true(each.leaf))
                elif exact or forest.recall(each.leaf.parent):
                    lacking.leaves[id(each.leaf)] = each.leaf
                    sure = False
        for new in born:
            if not rough and (found := self._found(forest, new)) is not None:
                moved.append(found)
                continue
            guess = self.reader.guess(new[1])
            if guess is None and self.cover.drop > 0:
                lacking.alone.append(new.token)
            made = _rough(new, guess or state.open[0].told)
            moved.append(made)
            sure = sure and rough and guess is not None
            if not rough and (exact or forest.recall(new.leaf)):
                lacking.leaves[id(made.leaf)] = made.leaf
        return moved, sure, step

    def _found(self, forest: Forest, born: Born) -> Hypothesis | None:
        """The hypothesis of a complete sequence, if it was read."""
        found = forest.find(born.leaf, born.token)
        if found is None:
            return None
        if not born.leaf.read and born.leaf.twin is not None:
            _, told = _twin(born.leaf)
            born = born._replace(true=_true(born.leaf) + told.log(born.token))
        return fresh(*found, born.mass, born.true)

    def _canonical(self, born: Born) -> bool:
        """Whether the tokenizer cuts the newest tokens as this sequence does; undecided inside a letter: yes.

        Spaces at the end are left out: many tokenizers cut them one way at the end of a text and another before a word.
        """
        tokens = [*born.leaf.path(WINDOW - 1), born.token]
        whole = len(tokens) == born.leaf.depth + 1
        spelt = [self.spelling.later[token] or b"" for token in tokens]
        if whole:
            spelt[0] = self.spelling.first[tokens[0]] or b""
        while spelt and not spelt[-1].strip():
            spelt.pop()
        tokens = tokens[: len(spelt)]
        try:
            text = b"".join(spelt).decode()
        except UnicodeDecodeError:
            return True
        if not tokens or text != text.rstrip():
            return True
        (cut,) = encode([text], self.tokenizer)
        return cut == tokens if whole else cut[-WINDOW // 2 :] == tokens[-WINDOW // 2 :]


def _rough(born: Born, told: Told) -> Hypothesis:
    """The hypothesis of a sequence that is not read: it goes on as `told`, what comes behind its last token alone."""
    above, token, true, mass = born
    leaf = Leaf(above, token)
    leaf.true = true
    return fresh(leaf, told, mass, true, rough=True)


def _twin(leaf: Leaf) -> Found:
    """Of a leaf that was not read at first what it is now."""
    assert leaf.twin is not None
    return leaf.twin


def _true(leaf: Leaf) -> float:
    """The log-probability of the sequence of a leaf that was not read at first, as far as it is known by now.

    Not that of what it is now, which may stand for other sequences too: where the model can read no further, for all
    that end alike.
    """
    if leaf.true == -math.inf and leaf.parent is not None and not leaf.parent.read and leaf.parent.twin is not None:
        _, told = _twin(leaf.parent)
        leaf.true = _true(leaf.parent) + told.log(leaf.token)
    return leaf.true


def _next_state(before: State, open_: list[Hypothesis], step: float) -> State:
    """The state of what is left. Where nothing is, no sequence writes this byte: it is left out of what is read.

    Where the next one cannot be written either, the bytes of tokens that are not complete are left out as well.
    """
    found = state_of(open_, before.log + step, step)
    if found.total > 0:
        return found
    if not before.stuck:
        return State(before.open, before.total, before.log, -math.inf, stuck=True)
    again_ = [fresh(each.leaf, each.told, each.mass, -math.inf, each.rough) for each in before.open]
    return state_of(again_, before.log, -math.inf)
