"""A model over tokens as a model over bytes: exact probabilities of the next byte behind any bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from graft.ensemble.byte_level.cover import Born, Hypothesis, State, Told, fresh, grown, pruned, state_of
from graft.ensemble.byte_level.forest import Forest, Leaf, Reader
from graft.ensemble.byte_level.spelling import spelling_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AHEAD = 128
"""Tokens that are read ahead at once where the text is known."""
SCOUT = 96
"""Bytes behind the first sequence that must be read, in which others are looked for."""
WINDOW = 16
"""Tokens before the end of a sequence from which it is cut anew, to see whether the tokenizer cuts it so."""


@dataclass(frozen=True)
class Cover:
    """Which token sequences count. `tokenisations`: `all` that spell the text, or `canonical` ones, those that the
    tokenizer makes. `drop`: the share of the probability that may be left out at each byte; 0: exact. `most`: sequences
    kept at most at each byte; None: all."""

    tokenisations: Literal["all", "canonical"] = "all"
    drop: float = 1e-3
    most: int | None = 16


EXACT = Cover(drop=0.0, most=None)


class ByteModel:
    """A causal language model and its tokenizer as a distribution over byte strings.

    It is p(bytes) = Σ p(tokens) over all token sequences that spell the bytes (Vieira et al. 2025; Phan et al. 2024),
    p over the tokens that write text and the end, renormalised. With `drop` ε at each byte, the distribution of texts
    of n bytes differs from the exact one by at most 1 - (1 - ε)ⁿ in total variation (while `most` leaves out no more).
    Raises CannotCombine for a tokenizer whose tokens have no bytes of their own.
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
        self.reader = Reader(model, self.spelling, limit=limit, name=name)
        self.cover, self.tokenizer = cover, tokenizer

    def begin(self, forest: Forest) -> State:
        """Before the first byte."""
        leaf, told = forest.root()
        first = told.trie.root
        open_ = [fresh(leaf, told, 0.0)]
        empty = [(leaf, int(told.trie.ids[place])) for place in range(first.low, first.low + first.own)]
        logs = [float(told.logs[place]) for place in range(first.low, first.low + first.own)]
        open_ += [fresh(*found, log) for found, log in zip(forest.read(empty), logs, strict=True)] if empty else []
        return state_of(open_)

    def advance(self, forest: Forest, states: Sequence[State], data: Sequence[int]) -> list[State]:
        """Each state one byte on, what is new read in one go. A byte that the model cannot write changes nothing."""
        plans = [self._plan(state, byte) for state, byte in zip(states, data, strict=True)]
        read = iter(forest.read([(each.leaf, each.token) for _, born, _ in plans for each in born]))
        made = []
        for state, (moved, born, gone) in zip(states, plans, strict=True):
            found = [fresh(*next(read), each.log) for each in born]
            made.append(_next_state(state, [*moved, *found], gone))
        return made

    def follow(self, forest: Forest, state: State, data: bytes) -> tuple[np.ndarray, State]:
        """`[len(data), 257] float64`: what comes behind each byte of a known text, and the state at its end.

        The sequence that the tokenizer makes is read ahead in one go. Others are looked for as if none of them were
        there yet, read together, and the bytes behind the first of them are gone through again.
        """
        nexts = np.empty((len(data), 257))
        done = 0
        while done < len(data):
            held = self._read_ahead(forest, state, data[done:])
            stop = min(len(data), done + max(1, sum(len(self._spelt(leaf)) for leaf, _ in held)))
            while done < stop:
                done, state, wanted = self._pass(forest, state, data, done, stop, nexts)
                held += forest.read(wanted)
        return nexts, state

    def _spelt(self, leaf: Leaf) -> bytes:
        spelt = self.spelling.first if leaf.depth == 1 else self.spelling.later
        return spelt[leaf.token] or b""

    def _pass(
        self, forest: Forest, state: State, data: bytes, begin: int, stop: int, nexts: np.ndarray
    ) -> tuple[int, State, list[tuple[Leaf, int]]]:
        """Go on from byte `begin` as long as all is read; returns how far, the state there, what is to be read."""
        here, reached, exact = state, begin, True
        wanted: dict[tuple[int, int], tuple[Leaf, int]] = {}
        for place in range(begin, stop):
            moved, born, gone = self._plan(here, data[place])
            found = [forest.find(each.leaf, each.token) for each in born]
            lacking = [each for each, known in zip(born, found, strict=True) if known is None]
            wanted |= {(id(each.leaf), each.token): (each.leaf, each.token) for each in lacking}
            known = [*moved, *(fresh(*f, each.log) for each, f in zip(born, found, strict=True) if f is not None)]
            if lacking and (sum(each.mass for each in known) < 0.5 * math.fsum(math.exp(b.log) for b in lacking)):
                break
            exact = exact and not lacking
            here = _next_state(here, known, gone)
            if exact:
                reached, state = place + 1, here
                nexts[place] = here.next
            elif place - reached > SCOUT:
                break
        return reached, state, list(wanted.values())

    def _plan(self, state: State, byte: int) -> tuple[list[Hypothesis], list[Born], float]:
        """What is kept of a state one byte on, before the model is asked; the share of mass left out."""
        moved, born = grown(state, byte)
        moved, born, gone = pruned(moved, born, self.cover.drop, self.cover.most)
        if self.cover.tokenisations == "all" or not born:
            return moved, born, gone
        kept = [each for each in born if self._canonical(each)]
        if not (kept or moved):
            return moved, born, gone
        total = sum(each.mass for each in moved) + math.fsum(math.exp(each.log) for each in born)
        away = math.fsum(math.exp(each.log) for each in born if each not in kept) / total
        return moved, kept, gone + (1 - gone) * away

    def _canonical(self, born: Born) -> bool:
        """Whether the tokenizer cuts the newest tokens as this sequence does; undecided inside a letter: yes."""
        depth = born.leaf.depth + 1
        tokens = [*born.leaf.path(WINDOW - 1), born.token]
        whole = len(tokens) == depth
        spelt = [self.spelling.later[token] or b"" for token in tokens]
        if whole:
            spelt[0] = self.spelling.first[tokens[0]] or b""
        try:
            text = b"".join(spelt).decode()
        except UnicodeDecodeError:
            return True
        cut = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return cut == tokens if whole else cut[-WINDOW // 2 :] == tokens[-WINDOW // 2 :]

    def _read_ahead(self, forest: Forest, state: State, data: bytes) -> list[tuple[Leaf, Told]]:
        """Read the likeliest sequence on through the text: only a guess, which changes no result."""
        likely = max(state.open, key=lambda each: each.mass)
        tokens = self._cut(likely.node.read + data[: 16 * AHEAD], likely.leaf.depth == 0)
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


def _next_state(before: State, open_: Sequence[Hypothesis], gone: float) -> State:
    """The state of what is left; the one before where nothing is (no sequence writes this byte)."""
    if not open_ or not any(each.mass > 0 for each in open_):
        return before
    return state_of(open_, before.lost - math.log1p(-gone))
