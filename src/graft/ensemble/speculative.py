"""Speculative ensembles: members draft tokens for each other and verify them; the distribution stays the ensemble's.

A drafted token is kept with probability min(1, p/q) of the ensemble's p and the drafting member's q, else one is drawn
from what p has above q (Leviathan et al. 2023). Members take turns (alternate proposals, Fu et al. 2025): one run of a
member judges the drafts before it and adds one. What a member gave while drafting is its part of p, so no member
computes a position of the kept text twice. Where drafts do not pay, all members run and one token is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from graft.ensemble.greedy import behind, pad_of, plain_greedy
from graft.ensemble.judging import Drawing, Judged, Verdict
from graft.ensemble.members import nan_words
from graft.ensemble.pending import Cell, Pending
from graft.ensemble.turns import Costs, Turns
from graft.errors import RequestError, RunError

if TYPE_CHECKING:
    from graft.ensemble.causal import EnsembleForCausalLM


@dataclass(frozen=True)
class Speculated:
    """`sequences [batch, longest]`, prompts included, padded behind; how many drafts were judged, and kept."""

    sequences: torch.Tensor
    drafted: int
    kept: int


@torch.no_grad()
def speculate(
    model: EnsembleForCausalLM,
    input_ids: torch.Tensor,
    draft: str | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    block: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Speculated:
    """Decode `input_ids [batch, length]` greedily (the same tokens as `generate`) or by sampling (the same
    distribution).

    A batch is padded on the left (`attention_mask`). `draft` names the member of non-zero weight that begins each
    round, and `block` how many tokens it drafts; None: what gives most tokens for the cost, from how many drafts were
    kept so far. Raises RequestError for other members, a temperature or block that is not above zero, an empty
    prompt, a context longer than a member's, a union of vocabularies, and rules that choose among whole outputs;
    RunError naming a member whose logits are NaN.
    """
    drafts = _drafts(model, draft)
    _check_above_zero(temperature=temperature, block=block)
    texts = _begin(model, input_ids, attention_mask, max_new_tokens)
    ends = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or ())
    lengths = list(map(len, texts))
    pending = Pending(model, texts, [length + max(max_new_tokens, 0) for length in lengths])
    turns = Turns(len(model.active), _costs(model, timed=not do_sample), drafts, block)
    writing = _Writing(model, pending, Drawing(temperature if do_sample else None, generator), ends, turns)
    while pending.rows:
        for numbers, drafting in turns.plan(len(pending.rows)).turns(len(model.active)):
            writing.turn(numbers, drafting)
            if not pending.drafts:
                break
    new = [text[length:firm] for text, length, firm in zip(texts, lengths, pending.firm, strict=True)]
    return Speculated(behind(input_ids, new, pad_of(model, pad_token_id, ends)), turns.drafted, turns.held)


def instead_of_generate(
    model: EnsembleForCausalLM, input_ids: torch.Tensor | None, options: Mapping[str, Any]
) -> torch.Tensor | None:
    """What `generate` would give with these options, where they are those of plain greedy decoding; else None."""
    asked = plain_greedy(model, input_ids, options)
    active = [model.config.members[place]["name"] for place in model.active]
    if asked is None or not model.caches or model.config.draft not in active:
        return None
    if model.gate is not None and model.gate.skips:
        return None
    return speculate(model, draft=model.config.draft, **asked).sequences


def _check_above_zero(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and number <= 0:
            raise RequestError(f"expected a {name} above zero, found {number}")


def _drafts(model: EnsembleForCausalLM, draft: str | None) -> list[int]:
    """Numbers of the members that may begin a round, among the active ones."""
    if model.union is not None:
        raise RequestError("speculation needs members of one vocabulary, found a union: use generate")
    if not model.caches:
        raise RequestError("speculation needs members whose cache is layers, found a recurrent state: use generate")
    if model.choose is not None:
        raise RequestError(f"speculation decodes token by token, found {model.config.combine}: use generate")
    names = [model.config.members[place]["name"] for place in model.active]
    if draft is None:
        return list(range(len(names)))
    if draft not in names:
        raise RequestError(f"expected a member with a weight as draft ({', '.join(names)}), found {draft!r}")
    return [names.index(draft)]


def _begin(
    model: EnsembleForCausalLM, input_ids: torch.Tensor, mask: torch.Tensor | None, count: int
) -> list[list[int]]:
    """The prompts without their padding."""
    model._check_prompts(mask)
    length = input_ids.shape[1]
    model._check_inputs(input_ids.new_empty(1, length + max(count - 1, 0) if length else 0), None)
    if mask is None:
        return input_ids.tolist()
    starts = mask.long().argmax(-1)
    if not torch.equal(mask.bool(), torch.arange(length, device=mask.device) >= starts[:, None]):
        raise RequestError("expected prompts that are padded on the left, found padding behind or within them")
    return [text[start:] for text, start in zip(input_ids.tolist(), starts.tolist(), strict=True)]


THREAD, ACCELERATOR = (6, 15e9), (256, 1e12)
"""Tokens that are read in about twice the time of one, since weights are fetched once for all, and the bytes of weights
that are fetched in a second: by each thread of a CPU the first, by all of them the second (measured on members of 5M to
25M parameters); by an accelerator both (a guess)."""
LAYER = 4e-4
"""Seconds that a layer takes whatever it reads: what calls its operations."""


def _costs(model: EnsembleForCausalLM, *, timed: bool) -> Costs:
    """What runs of the active members are taken to cost until they are timed."""
    cpu = model.device.type == "cpu"
    free, speed = (THREAD[0] * torch.get_num_threads(), THREAD[1]) if cpu else ACCELERATOR
    sizes = []
    for place in model.active:
        start, stop = model.spans[place]
        held = sum(weight.numel() * weight.element_size() for weight in model.members[place].parameters())
        sizes.append((LAYER * (stop - start), held / speed))
    return Costs(sizes, free, timed)


@dataclass(frozen=True)
class _Writing:
    """`ends`: tokens that end a text."""

    model: EnsembleForCausalLM
    pending: Pending
    drawing: Drawing
    ends: frozenset[int]
    turns: Turns

    def turn(self, numbers: Sequence[int], drafting: bool) -> None:
        """Members read what is new to them and, where they draft, add a token to every row; what all members have
        spoken of is kept or replaced."""
        pending, begun = self.pending, perf_counter()
        rows, reads, prompts = len(pending.rows), list(map(pending.reads, numbers)), self._prompts(numbers)
        self.model._each(numbers, pending.read)
        for number in numbers if drafting else ():
            self._draft(number)
        self._judge()
        self.turns.took(numbers, reads, rows, None if prompts else perf_counter() - begun)

    def _prompts(self, numbers: Sequence[int]) -> bool:
        """Whether any of these members reads the prompts, which takes longer than other turns."""
        return not all(self.pending.held[number].count(self.pending.rows[0]) for number in numbers)

    def _draft(self, number: int) -> None:
        if not (cells := self.pending.ends(number)):
            return
        told = self.pending.said(number, cells).log_probs
        if bool(told[:, 0].isnan().any()):
            raise RunError(nan_words(self.model.config.members[self.model.active[number]]))
        self.pending.draft(number, cells, *self.drawing.draw(told))

    def _judge(self) -> None:
        pending = self.pending
        counts = {row: count for row in pending.rows if (count := pending.known(row))}
        cells = [(row, pending.firm[row] + at) for row, count in counts.items() for at in range(count)]
        if not cells:
            return
        told, mixed = self._mixed(cells)
        judged = [pending.judged(row, count) for row, count in counts.items()]
        verdicts = self.drawing.judge(judged, mixed)
        self._note(judged, verdicts, told, mixed)
        for row, verdict in zip(counts, verdicts, strict=True):
            self._take(row, pending.settle(row, verdict))

    def _note(
        self, judged: Sequence[Judged], verdicts: Sequence[Verdict], told: Sequence[torch.Tensor], mixed: torch.Tensor
    ) -> None:
        """How well members draft is seen wherever a token was written: all of them have spoken of it."""
        firsts = [0, *itertools.accumulate(each.cells for each in judged)]
        written = [
            first + at
            for first, verdict in zip(firsts, verdicts, strict=False)
            for at in range(verdict.kept + (verdict.instead is not None))
        ]
        if len(written) < len(mixed):
            told, mixed = [each[written] for each in told], mixed[written]
        held = sum(verdict.kept for verdict in verdicts)
        lost = sum(verdict.kept < len(each.tokens) for each, verdict in zip(judged, verdicts, strict=True))
        self.turns.saw(self.drawing.agreement(told, mixed), len(written), held + lost, held)

    def _mixed(self, cells: Sequence[Cell]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The members' log-probabilities and the ensemble's, each `[cells, vocabulary]`."""
        model = self.model
        told = [self.pending.said(number, cells) for number in range(len(model.active))]
        weights = model.weights if model.gate is None else model.gate.decide([told[n] for n in model.gate.looks_at])
        return [each.log_probs for each in told], model.mixed(told, weights, None)

    def _take(self, row: int, new: Sequence[int]) -> None:
        """Ends a row whose `new` tokens hold an end, or fill it."""
        pending = self.pending
        end = next((place for place, token in enumerate(new, start=1) if token in self.ends), None)
        if end is not None:
            pending.firm[row] -= len(new) - end
        if end is not None or pending.firm[row] == pending.limits[row]:
            pending.leave(row)
