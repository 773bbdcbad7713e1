"""A model over tokens as a model over bytes: exact probabilities of the next byte behind any bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from graft.ensemble.byte_level.cover import (
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
from graft.ensemble.byte_level.forest import Forest, Reader
from graft.ensemble.byte_level.leaf import UNREAD, Leaf
from graft.ensemble.byte_level.spelling import spelling_of
from graft.ensemble.configuration import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AHEAD = 64
"""Tokens that are read ahead at once where the text is known."""
SCOUT, NEAR = 128, 64
"""Bytes behind the first sequence that must be read, in which others are looked for: the first time, and again."""
PROMOTED = 0.1
"""Share of the mass from which on a sequence that was not read is."""
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


class Plan(NamedTuple):
    """What is followed of a state one byte on: what goes on (`moved`) and what is complete (`born`), whether that stays
    unread (`rough`), and the log-probability of the byte (`step`)."""

    moved: list[Hypothesis]
    born: list[Born]
    rough: bool
    step: float


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

    def begin(self, forest: Forest) -> State:
        """Before the first byte."""
        leaf, told = forest.root()
        first = told.trie.root
        open_ = [fresh(leaf, told, 0.0, 0.0)]
        empty = [(leaf, int(told.trie.ids[place])) for place in range(first.low, first.low + first.own)]
        logs = [float(told.logs[place]) for place in range(first.low, first.low + first.own)]
        found = forest.read(empty) if empty else []
        return state_of(open_ + [fresh(*pair, log, log) for pair, log in zip(found, logs, strict=True)])

    def advance(self, forest: Forest, states: Sequence[State], data: Sequence[int]) -> list[State]:
        """Each state one byte on, what is new read in one go. A byte that the model cannot write changes nothing."""
        plans = [self._plan(forest, state, byte) for state, byte in zip(states, data, strict=True)]
        read = iter(forest.read([(each.leaf, each.token) for plan in plans if not plan.rough for each in plan.born]))
        made = []
        for state, (moved, born, rough, step) in zip(states, plans, strict=True):
            alone = self.reader.alone([each.token for each in born] if rough else [])
            found = [_rough(*pair) for pair in zip(born, alone, strict=True)] if rough else []
            found += [] if rough else [_sure(next(read), each) for each in born]
            made.append(_next_state(state, [*moved, *found], step))
        return made

    def chance(self, state: State, byte: int) -> float:
        """The log-probability of a byte behind a state."""
        return step_of(state, *grown(state, byte))

    def follow(self, forest: Forest, state: State, data: bytes, note: Callable[[int, State], None]) -> State:
        """The state at the end of a known text; `note` is given the state behind each of its bytes, in order.

        The sequence that the tokenizer makes is read ahead in one go. Others are looked for as if they were rough,
        read together, and the bytes behind the first of them are gone through again.
        """
        done = 0
        while done < len(data):
            held = self._read_ahead(forest, state, data[done:])
            stop = min(len(data), done + max(1, sum(len(self._spelt(leaf)) for leaf, _ in held)))
            seen = done
            while done < stop:
                horizon = SCOUT if done >= seen else NEAR
                seen = max(seen, min(done + horizon, stop))
                done, state, wanted = self._pass(forest, state, data[:stop], done, horizon, note)
                held += forest.catch_up(wanted)
        return state

    def _spelt(self, leaf: Leaf) -> bytes:
        spelt = self.spelling.first if leaf.depth == 1 else self.spelling.later
        return spelt[leaf.token] or b""

    def _pass(
        self, forest: Forest, state: State, data: bytes, begin: int, horizon: int, note: Callable[[int, State], None]
    ) -> tuple[int, State, list[Leaf]]:
        """Go on from byte `begin` as long as all is known; returns how far, the state there, what is to be read.

        Behind the first byte that something is lacking for, what stands for it is a guess: only to see what else is.
        """
        here, reached, exact = state, begin, True
        wanted: dict[int, Leaf] = {}
        single: list[int] = []
        for place in range(begin, len(data)):
            moved, born, rough, step = self._plan(forest, here, data[place], None if exact else wanted)
            known = list(moved)
            for each in born:
                found = None if rough else forest.find(each.leaf, each.token)
                if found:
                    known.append(_sure(found, each))
                    continue
                told, sure = self.reader.guess(each.token, here.open[0].told)
                known.append(_rough(each, told))
                exact = exact and rough and sure
                single += [] if sure else [each.token]
                if not rough:
                    wanted[id(known[-1].leaf)] = known[-1].leaf
            here = _next_state(here, known, step)
            if exact:
                reached, state = place + 1, here
                note(place, here)
            elif place - reached > horizon or len(wanted) > AHEAD:
                break
        self.reader.alone(single if self.cover.drop > 0 else [])
        return reached, state, list(wanted.values())

    def _plan(self, forest: Forest, state: State, byte: int, wanted: dict[int, Leaf] | None = None) -> Plan:
        """What is followed of a state one byte on, before the model is asked.

        What has become likely of what was not read is read now; where `wanted` is given, it goes there.
        """
        moved, born = grown(state, byte)
        step = step_of(state, moved, born)
        if self.cover.tokenisations == "canonical" and born:
            kept = [each for each in born if self._canonical(each)]
            born = kept if kept or moved else born
        # what goes on as another one does must not be refused where that one is
        join = self.cover.join if self.cover.tokenisations == "all" else 0.0
        moved, born, rough = chosen(moved, born, self.cover.drop, join, self.cover.most)
        if any(each.rough for each in moved):
            likely = PROMOTED * (sum(each.mass for each in moved) + sum(each.mass for each in born))
            moved = [
                self._promoted(forest, each, wanted) if each.rough and each.mass > likely else each for each in moved
            ]
        if wanted is None and not rough:
            born = [self._grounded(forest, each) for each in born]
        return Plan(moved, born, rough, step)

    def _promoted(self, forest: Forest, rough: Hypothesis, wanted: dict[int, Leaf] | None) -> Hypothesis:
        if wanted is not None and not forest.recall(rough.leaf):
            wanted[id(rough.leaf)] = rough.leaf
            return rough
        leaf, told = self._read(forest, rough.leaf)
        return again(rough, leaf, told, leaf.true)

    def _grounded(self, forest: Forest, born: Born) -> Born:
        """The same, with the sequence before its last token read."""
        if born.leaf.read:
            return born
        leaf, told = self._read(forest, born.leaf)
        return born._replace(leaf=leaf, true=leaf.true + told.log(born.token))

    def _read(self, forest: Forest, leaf: Leaf) -> tuple[Leaf, Told]:
        """The leaf of a sequence that was not read, read now."""
        assert leaf.parent is not None
        if leaf.twin is None:
            forest.catch_up([leaf])
        if leaf.twin is None:  # no room: what stands behind it is read first
            leaf.twin = forest.read([(leaf.parent.now, leaf.token)])[0]
        found = leaf.twin[0]
        if leaf.true == -math.inf and not leaf.parent.read:
            above, told = self._read(forest, leaf.parent)
            leaf.true = above.true + told.log(leaf.token)
        found.true = max(found.true, leaf.true)
        return leaf.twin

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
        cut = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return cut == tokens if whole else cut[-WINDOW // 2 :] == tokens[-WINDOW // 2 :]

    def _read_ahead(self, forest: Forest, state: State, data: bytes) -> list[tuple[Leaf, Told]]:
        """Read the likeliest sequence on through the text: only a guess, which changes no result."""
        likely = max(state.open, key=lambda each: each.mass)
        if not likely.leaf.read:
            return []
        tokens = self._cut(likely.node.read + data[: 16 * AHEAD], likely.leaf.depth == 0)
        if self.cover.drop > 0:
            self.reader.alone([part for token in tokens[:AHEAD] for part in self.reader.parts(token)])
        return forest.chain(likely.leaf, tokens[:AHEAD])

    def _cut(self, text: bytes, first: bool) -> list[int]:
        """Tokens that spell the text (or its beginning): the tokenizer's as far as they do, then the longest."""
        ids = self.tokenizer.backend_tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        made: list[int] = []
        done = 0
        for token in ids:
            spelt = (self.spelling.first if first and not made else self.spelling.later)[token]
            if not spelt or text[done : done + len(spelt)] != spelt:
                break
            made.append(token)
            done += len(spelt)
        while done < len(text) and len(made) < AHEAD:
            trie = self.reader.first if first and not made else self.reader.later
            found = trie.longest(text[done : done + 64])
            if found is None:
                break
            made.append(found[0])
            done += found[1]
        return made


def _rough(born: Born, told: Told) -> Hypothesis:
    """The hypothesis of a sequence that is not read: it goes on as `told`, what comes behind its last token alone."""
    leaf = Leaf(born.leaf, born.token, UNREAD)
    leaf.true = born.true
    return fresh(leaf, told, born.log, born.true, rough=True)


def _sure(found: tuple[Leaf, Told], born: Born) -> Hypothesis:
    """The hypothesis of a sequence that is read."""
    leaf, told = found
    leaf.true = max(leaf.true, born.true)
    return fresh(leaf, told, born.log, leaf.true)


def _next_state(before: State, open_: Sequence[Hypothesis], step: float) -> State:
    """The state of what is left. Where nothing is, no sequence writes this byte: it is left out of what is read.

    Where the next one cannot be written either, the bytes of tokens that are not complete are left out as well.
    """
    if any(each.mass > 0 for each in open_):
        return state_of(open_, before.log + step, step)
    if not before.stuck:
        return replace(before, step=-math.inf, stuck=True)
    again_ = [fresh(each.leaf, each.told, math.log(each.mass), -math.inf, each.rough) for each in before.open]
    return state_of(again_, before.log, -math.inf)
