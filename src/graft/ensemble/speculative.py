"""Speculative ensembles: members draft tokens for each other and verify them; the distribution stays the ensemble's.

A drafted token is kept with probability min(1, p/q) of the ensemble's p and the drafting member's q, else one is drawn
from what p has above q (Leviathan et al. 2023). Members take turns (alternate proposals, Fu et al. 2025): one run of a
member judges the drafts before it and adds one. What a member gave while drafting is its part of p, so no member
computes a column of the kept text twice. In a batch each row goes on as far as its own drafts are kept. Where drafts do
not pay, all members run for each token, as they do in plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graft.ensemble.gate import Told
from graft.ensemble.greedy import behind, pad_of, plain_greedy
from graft.ensemble.members import nan_words
from graft.ensemble.pending import Pending, Verdict
from graft.ensemble.recalled import BEFORE, Recalled
from graft.ensemble.turns import ACCELERATOR, THREAD, Plan, Turns
from graft.errors import RequestError, RunError
from graft.prefix_lm import prefix_lms

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
    clock: Callable[[], float] = perf_counter,
) -> Speculated:
    """Decode `input_ids [batch, length]` greedily (the same tokens as `generate`) or by sampling (the same
    distribution).

    A batch is padded on the left (`attention_mask`). `draft` names the member of non-zero weight that begins each
    round, and `block` how many tokens it drafts; None: what gives most tokens for the cost, plain decoding included,
    from how many drafts were kept so far, and where decoding is greedy also from the time that drafting and plain
    decoding took (`clock`, in seconds). Raises RequestError for other members, a temperature or block that is not above
    zero, an empty prompt, a context longer than a member's, prefix LMs, a union of vocabularies, and rules that choose
    among whole outputs; RunError naming a member whose logits are NaN.
    """
    if prefix_lms(model):
        raise RequestError(
            "expected members that read from left to right to speculate with, found a prefix LM: use `generate`"
        )
    drafts = _drafts(model, draft)
    _check_above_zero(temperature=temperature, block=block)
    ids, starts = _begin(model, input_ids, attention_mask, max_new_tokens)
    sizes = [float(sum(weight.numel() for weight in model.members[place].parameters())) for place in model.active]
    free = THREAD * torch.get_num_threads() if model.device.type == "cpu" else ACCELERATOR
    turns = Turns(sizes, drafts, free, len(ids), block, None if do_sample else clock)
    ends = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or ())
    answers = _Answers([ids.shape[1] - start + max_new_tokens for start in starts], ends, {})
    drawing = _Drawing(temperature if do_sample else None, generator)
    round_ = _Round(model, Pending(model, ids, starts), drawing, answers, Recalled(model))
    while round_.pending.rows and max_new_tokens > 0:
        round_.go(turns, ids.shape[1] + max_new_tokens)
    new = [answers.rows[row][ids.shape[1] - start :] if max_new_tokens > 0 else [] for row, start in enumerate(starts)]
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
) -> tuple[torch.Tensor, list[int]]:
    """The prompts without what is padding in all rows, and where each begins."""
    model._check_prompts(mask)
    length = input_ids.shape[1]
    model._check_inputs(input_ids.new_empty(1, length + max(count - 1, 0) if length else 0), None)
    if mask is None:
        return input_ids.to(model.device), [0] * len(input_ids)
    starts = mask.long().argmax(-1)
    if not torch.equal(mask.bool(), torch.arange(length, device=mask.device) >= starts[:, None]):
        raise RequestError("expected prompts that are padded on the left, found padding behind or within them")
    first = int(starts.min())
    return input_ids[:, first:].to(model.device), (starts - first).tolist()


@dataclass(frozen=True)
class _Round:
    """What happens to pending texts until the turns are planned again."""

    model: EnsembleForCausalLM
    pending: Pending
    drawing: _Drawing
    answers: _Answers
    recalled: Recalled

    def go(self, turns: Turns, longest: int) -> None:
        """A round as it is planned; no text becomes longer than the `longest`."""
        left = self.answers.left(self.pending)
        plan, rows = turns.plan(left), len(left)
        drafting = plan.block > 0 or any(self.pending.by)
        if plan.block:
            runs = list(self._drafted(plan, turns, longest))
        else:
            runs = [(number, self.pending.read(number, self.pending.length)) for number in self.numbers]
            if drafting:
                turns.saw(self.judge())
            else:
                self.write(turns, left)
        turns.took(drafting, [(number, count) for number, count in runs if count], rows)

    def _drafted(self, plan: Plan, turns: Turns, longest: int) -> Iterator[tuple[int, int]]:
        """Members run in turn, and draft; which, and how many tokens they read."""
        for number, drafts in plan.turns(len(self.numbers)):
            yield number, self.run(number, drafts and self.pending.length < longest)
            turns.saw(self.judge())
            if not any(self.pending.by):
                return

    def run(self, number: int, drafting: bool) -> int:
        """A member reads what is new to it and, where it drafts, adds a token to every row. Returns how many tokens it
        read of each."""
        pending, model = self.pending, self.model
        count = pending.read(number, pending.length if drafting else pending.length - 1)
        if drafting:
            told = pending.said(number, pending.length, pending.length + 1).log_probs[:, 0]
            if bool(told[:, 0].isnan().any()):
                raise RunError(nan_words(model.config.members[model.active[number]]))
            pending.draft(number, *self.drawing.draw(self._proposed(number, told)))
        return count

    def _proposed(self, number: int, told: torch.Tensor) -> torch.Tensor:
        """What a member drafts from behind every row, where it says `told [rows, vocabulary]`."""
        return self.recalled.drafts(number, self.pending.rows, self.pending.text[:, -BEFORE:], told)

    def judge(self) -> list[tuple[int, int, bool]]:
        """What all members have spoken of is kept or replaced; in which rows whose drafts were judged, and whether they
        were kept."""
        pending = self.pending
        first, stop = pending.first, min(pending.stop, pending.length)
        if first >= stop:
            return []
        told = [pending.said(number, first, stop) for number in self.numbers]
        mixed = _mixed(self.model, told, self._mask(first, stop))
        counts = [max(0, len(by) - (pending.length - stop)) for by in pending.by]
        self.recalled.hear(pending.rows, pending.text[:, max(0, first - BEFORE) : stop - 1], counts, told)
        drawn = None if pending.drawn is None else pending.drawn[:, first - pending.length :][:, : stop - first]
        verdicts = self.drawing.judge(pending.text[:, first:stop], mixed, drawn, counts)
        seen = [
            (row, number, place < verdict.kept)
            for row, by, verdict in zip(pending.rows, pending.by, verdicts, strict=True)
            for place, number in enumerate(by[: verdict.kept + (verdict.instead is not None)])
        ]
        pending.settle(verdicts, self.answers.take(pending, verdicts))
        return seen

    @property
    def numbers(self) -> range:
        """Of the active members."""
        return range(len(self.model.active))

    def _mask(self, first: int, stop: int) -> torch.Tensor | None:
        """Mask `[rows, columns]` of what a column before these, in which the text has begun, says of them."""
        starts = self.pending.starts
        if first > max(starts):
            return None
        columns = torch.arange(first, stop, device=self.model.device)
        return columns > torch.tensor(starts, device=self.model.device)[:, None]

    def write(self, turns: Turns, left: Mapping[int, int]) -> None:
        """A token behind every text, none of which ends in a draft, now that all members have read them; so many are
        `left` to be written."""
        pending = self.pending
        told = [pending.said(number, pending.length, pending.length + 1) for number in self.numbers]
        tokens, drawn = self.drawing.draw(_mixed(self.model, told, None)[:, 0])
        if turns.looks:
            proposed = [self._proposed(number, told[number].log_probs[:, 0]) for number in self.numbers]
            turns.would(pending.rows, self.drawing.agreed(tokens, drawn, proposed))
        self.recalled.hear(pending.rows, pending.text[:, -BEFORE:], [1] * len(pending.rows), told)
        new = tokens.tolist()
        over = 1 in left.values() or not self.answers.ends.isdisjoint(new)
        done = self.answers.take(pending, [Verdict(0, 0, token) for token in new]) if over else []
        pending.write(tokens)
        if any(done):
            pending.settle([Verdict(0, 0, None)] * len(done), done)


def _mixed(model: EnsembleForCausalLM, told: Sequence[Told], mask: torch.Tensor | None) -> torch.Tensor:
    """The ensemble's log-probabilities `[rows, columns, vocabulary]` of what its active members say."""
    weights = model.weights if model.gate is None else model.gate.decide([told[n] for n in model.gate.looks_at])
    return model.mixed(told, weights, mask)


@dataclass(frozen=True)
class _Answers:
    """`lengths`: how long each row's text may become, prompt included; `ends`: tokens that end it; `rows`: the texts
    that are finished, by row."""

    lengths: Sequence[int]
    ends: frozenset[int]
    rows: dict[int, list[int]]

    def left(self, pending: Pending) -> dict[int, int]:
        """How many tokens are left to be written in each row that is pending."""
        texts = zip(pending.rows, pending.by, pending.starts, strict=True)
        return {row: self.lengths[row] - (pending.length - len(by) - start) for row, by, start in texts}

    def take(self, pending: Pending, verdicts: Sequence[Verdict]) -> list[bool]:
        """Takes the texts that are finished by these verdicts; for each row whether it is."""
        return [self._finished(pending, place, verdict) for place, verdict in enumerate(verdicts)]

    def _finished(self, pending: Pending, place: int, verdict: Verdict) -> bool:
        row, firm = pending.rows[place], pending.length - len(pending.by[place])
        new = pending.text[place, firm : firm + verdict.kept].tolist()
        new += [] if verdict.instead is None else [verdict.instead]
        left = self.lengths[row] - (firm - pending.starts[place])
        end = min(left, next((at + 1 for at, token in enumerate(new) if token in self.ends), left))
        if len(new) < end:
            return False
        self.rows[row] = pending.text[place, pending.starts[place] : firm].tolist() + new[:end]
        return True


@dataclass(frozen=True)
class _Drawing:
    """Greedy where `temperature` is None."""

    temperature: float | None
    generator: torch.Generator | None

    def draw(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A token for each row of `[rows, vocabulary]`, and the probabilities it was drawn from."""
        if self.temperature is None:
            return log_probs.argmax(-1), None
        probs = (log_probs / self.temperature).softmax(-1)
        return torch.multinomial(probs, 1, generator=self.generator)[:, 0], probs

    def agreed(self, tokens: torch.Tensor, drawn: torch.Tensor | None, told: Sequence[torch.Tensor]) -> np.ndarray:
        """With what probability each member's draft would have been kept `[rows, members]`, where the ensemble's
        `tokens [rows]` were drawn from its probabilities `drawn [rows, vocabulary]`, and members say `told`, alike."""
        if drawn is None or self.temperature is None:
            return torch.stack([each.argmax(-1) == tokens for each in told], -1).double().cpu().numpy()
        shared = [torch.minimum(drawn, (each / self.temperature).softmax(-1)).sum(-1) for each in told]
        return torch.stack(shared, -1).double().cpu().numpy()

    def judge(
        self, tokens: torch.Tensor, mixed: torch.Tensor, drawn: torch.Tensor | None, counts: Sequence[int]
    ) -> list[Verdict]:
        """On each row's last `counts[row]` of `tokens [rows, columns]`, given what the ensemble says of them (`mixed
        [rows, columns, vocabulary]`) and the probabilities they were drawn from (`drawn`, alike)."""
        if self.temperature is None or drawn is None:
            best = mixed.argmax(-1)
            right, instead = best == tokens, lambda row, column: int(best[row, column])
        else:
            probs, places = (mixed / self.temperature).softmax(-1), tokens[..., None]
            chance = torch.rand(tokens.shape, generator=self.generator, device=mixed.device)
            right = chance * drawn.gather(-1, places)[..., 0] < probs.gather(-1, places)[..., 0]
            instead = lambda row, column: self._rest(probs[row, column], drawn[row, column])  # noqa: E731
        verdicts = []
        for row, (own, count) in enumerate(zip(right.tolist(), counts, strict=True)):
            first = len(own) - count
            kept = [*own[first:], False].index(False)
            verdicts.append(Verdict(count, kept, instead(row, first + kept) if kept < count else None))
        return verdicts

    def _rest(self, ours: torch.Tensor, theirs: torch.Tensor) -> int:
        """A token of what the ensemble's probabilities `[vocabulary]` have above the draft's."""
        rest = (ours - theirs).clamp(min=0)
        return int(torch.multinomial(rest if float(rest.sum()) > 0 else ours, 1, generator=self.generator))
