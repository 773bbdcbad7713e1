"""Speculative ensembles: members draft tokens for each other and verify them; the distribution stays the ensemble's.

A drafted token is kept with probability min(1, p/q) of the ensemble's p and the drafting member's q, else one is drawn
from what p has above q (Leviathan et al. 2023). Members take turns (alternate proposals, Fu et al. 2025): one run of a
member judges the drafts before it and adds one. What a member gave while drafting is its part of p, so no member
computes a column of the kept text twice. In a batch each row goes on as far as its own drafts are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graft.ensemble.greedy import behind, pad_of, plain_greedy
from graft.ensemble.members import nan_words
from graft.ensemble.pending import Pending, Verdict
from graft.ensemble.turns import ACCELERATOR, THREAD, Turns
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
) -> Speculated:
    """Decode `input_ids [batch, length]` greedily (the same tokens as `generate`) or by sampling (the same
    distribution).

    A batch is padded on the left (`attention_mask`). `draft` names the member of non-zero weight that begins each
    round, and `block` how many tokens it drafts; None: what gives most tokens for the cost, from how many drafts were
    kept so far. Raises RequestError for other members, a temperature or block that is not above zero, an empty
    prompt, a context longer than a member's, prefix LMs, a union of vocabularies, and rules that choose among whole
    outputs; RunError naming a member whose logits are NaN.
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
    turns, pending = Turns(sizes, drafts, free, block), Pending(model, ids, starts)
    ends = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or ())
    answers = _Answers([ids.shape[1] - start + max_new_tokens for start in starts], ends, {})
    drawing, longest = _Drawing(temperature if do_sample else None, generator), ids.shape[1] + max_new_tokens
    while pending.rows and max_new_tokens > 0:
        plan = turns.plan(len(pending.rows))
        for number, drafting in plan.turns(len(sizes)):
            _run(model, pending, number, drafting and pending.length < longest, drawing)
            turns.saw(_judge(model, pending, drawing, answers))
            if not any(pending.by):
                break
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


def _run(model: EnsembleForCausalLM, pending: Pending, number: int, drafting: bool, drawing: _Drawing) -> None:
    """A member reads what is new to it and, where it drafts, adds a token to every row."""
    pending.read(number, pending.length if drafting else pending.length - 1)
    if not drafting:
        return
    told = pending.said(number, pending.length, pending.length + 1).log_probs[:, 0]
    if bool(told[:, 0].isnan().any()):
        raise RunError(nan_words(model.config.members[model.active[number]]))
    pending.draft(number, *drawing.draw(told))


def _judge(
    model: EnsembleForCausalLM, pending: Pending, drawing: _Drawing, answers: _Answers
) -> list[tuple[int, bool]]:
    """What all members have spoken of is kept or replaced; whose drafts were judged, and whether they were kept."""
    first, stop = pending.first, pending.stop
    if first >= stop:
        return []
    mixed = _mixed(model, pending, first, stop)
    counts = [max(0, len(by) - (pending.length - stop)) for by in pending.by]
    drawn = None if pending.drawn is None else pending.drawn[:, first - pending.length :][:, : stop - first]
    verdicts = drawing.judge(pending.text[:, first:stop], mixed, drawn, counts)
    seen = [
        (number, place < verdict.kept)
        for by, verdict in zip(pending.by, verdicts, strict=True)
        for place, number in enumerate(by[: verdict.kept + (verdict.instead is not None)])
    ]
    done = answers.take(pending, verdicts)
    pending.settle(verdicts, done)
    return seen


def _mixed(model: EnsembleForCausalLM, pending: Pending, first: int, stop: int) -> torch.Tensor:
    """The ensemble's log-probabilities `[rows, columns, vocabulary]` of the columns from `first` to before `stop`."""
    told = [pending.said(number, first, stop) for number in range(len(model.active))]
    weights = model.weights if model.gate is None else model.gate.decide([told[n] for n in model.gate.looks_at])
    columns = torch.arange(first, stop, device=model.device)
    return model.mixed(told, weights, columns > torch.tensor(pending.starts, device=model.device)[:, None])


@dataclass(frozen=True)
class _Answers:
    """`lengths`: how long each row's text may become, prompt included; `ends`: tokens that end it; `rows`: the texts
    that are finished, by row."""

    lengths: Sequence[int]
    ends: frozenset[int]
    rows: dict[int, list[int]]

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
