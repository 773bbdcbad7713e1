"""Speculative ensembles: one member drafts a block, the others verify it; the distribution stays the ensemble's.

A drafted token is kept with probability min(1, p/q) of the ensemble's p and the draft's q, else one is drawn from what
p has above q (Leviathan et al. 2023; for ensembles Fu et al. 2025). The draft is a member itself: what it gave while
drafting is its part of p, so no member computes anything twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicCache

from graft.ensemble.gate import Told, joined
from graft.errors import RequestError

if TYPE_CHECKING:
    from graft.ensemble.causal import EnsembleForCausalLM

MOST = 16
"""Tokens that are drafted at once at most."""


@dataclass(frozen=True)
class Speculated:
    """`sequences [1, length]`, prompt included; for every block how many tokens were drafted and kept."""

    sequences: torch.Tensor
    drafted: list[int]
    kept: list[int]


@dataclass
class BlockLength:
    """How many tokens to draft: what gives most tokens for the cost, from how often drafts were kept so far.

    A block of k costs k · `draft` + `verify` and gives 1 + a + … + a^(k-1) tokens where each draft is kept with
    probability a. With a = 0 that is a block of one: the plain ensemble.
    """

    draft: float
    verify: float
    kept: float = field(default=2.0, init=False)
    tried: float = field(default=3.0, init=False)

    def best(self) -> int:
        """The block length to use now."""
        share = self.kept / self.tried
        gains = [sum(share**place for place in range(length)) for length in range(1, MOST + 1)]
        rates = [gain / (length * self.draft + self.verify) for length, gain in enumerate(gains, start=1)]
        return 1 + rates.index(max(rates))

    def saw(self, kept: int, drafted: int) -> None:
        """Of so many drafted tokens so many were kept; older blocks count less and less."""
        self.kept = 0.9 * self.kept + kept
        self.tried = 0.9 * self.tried + min(kept + 1, drafted)


@torch.no_grad()
def speculate(
    model: EnsembleForCausalLM,
    input_ids: torch.Tensor,
    draft: str,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    block: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Speculated:
    """Decode `input_ids [1, length]` greedily (the same tokens as `generate`) or by sampling (the same distribution).

    `draft` names a member of non-zero weight. `block` None: its length follows what is kept. Raises RequestError for
    other batches, other members, and a union of vocabularies.
    """
    place = _place(model, input_ids, draft)
    sizes = [sum(weight.numel() for weight in model.members[each].parameters()) for each in model.active]
    own = sizes[model.active.index(place)]
    length = BlockLength(own, sum(sizes) - own)
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    drawing = _Drawing(temperature if do_sample else None, generator)
    cache, text = DynamicCache(config=model.config), input_ids
    drafted, kept = [], []
    while text.shape[1] < input_ids.shape[1] + max_new_tokens:
        left = input_ids.shape[1] + max_new_tokens - text.shape[1]
        tried = min(block or length.best(), left)
        model._check_inputs(text.new_empty(1, text.shape[1] + tried - 1), None)
        block_ids, told = _draft(model, place, text, tried, cache, drawing)
        mixed = _verify(model, place, text, block_ids, told, cache)
        new, count = drawing.keep(block_ids[0], mixed[0], told.log_probs[0])
        text = torch.cat([text, new[None]], 1)
        length.saw(count, tried)
        drafted.append(tried)
        kept.append(count)
        stop = next((at for at, token in enumerate(new.tolist()) if token in ends), None)
        if stop is not None:
            return Speculated(text[:, : text.shape[1] - len(new) + stop + 1], drafted, kept)
        _forget(cache, text.shape[1] - 1)
    return Speculated(text, drafted, kept)


def _place(model: EnsembleForCausalLM, input_ids: torch.Tensor, draft: str) -> int:
    names = [model.config.members[place]["name"] for place in model.active]
    if draft not in names:
        raise RequestError(f"expected a member with a weight as draft ({', '.join(names)}), found {draft!r}")
    if input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise RequestError(f"speculation decodes one prompt at a time, found a batch of shape {tuple(input_ids.shape)}")
    if model.union is not None:
        raise RequestError("speculation needs members of one vocabulary, found a union: use generate")
    return model.active[names.index(draft)]


def _forget(cache: Cache, length: int) -> None:
    """Every layer keeps `length` tokens at most; members need not have read equally far."""
    for place, layer in enumerate(cache.layers):
        seen = cache.get_seq_length(place)
        if seen > length:
            layer.crop(length - seen)  # type: ignore[union-attr]


def _told(model: EnsembleForCausalLM, place: int, text: torch.Tensor, keep: int, cache: Cache) -> Told:
    """What a member says `[1, keep, …]` at the end of `text`; it reads what is new to it."""
    seen = cache.get_seq_length(model.spans[place][0])
    given = {"attention_mask": None, "position_ids": None, "logits_to_keep": keep}
    states = model.gate is not None and model.gate.states
    return model._asked(place, text[:, seen:], given, cache, states)


def _draft(
    model: EnsembleForCausalLM, place: int, text: torch.Tensor, count: int, cache: Cache, drawing: _Drawing
) -> tuple[torch.Tensor, Told]:
    """Drafted ids `[1, count]` and what the draft says `[1, count, …]`."""
    start, told = text.shape[1], []
    for _ in range(count):
        told.append(_told(model, place, text, 1, cache))
        text = torch.cat([text, drawing.draw(told[-1].log_probs[0, -1])[None]], 1)
    return text[:, start:], joined(told)


def _verify(
    model: EnsembleForCausalLM, place: int, text: torch.Tensor, block: torch.Tensor, told: Told, cache: Cache
) -> torch.Tensor:
    """The ensemble's log-probabilities `[1, block, vocabulary]` where the block's tokens stand."""
    whole = torch.cat([text, block[:, :-1]], 1)
    every = [told if each == place else _told(model, each, whole, block.shape[1], cache) for each in model.active]
    weights = model.weights if model.gate is None else model.gate.decide([every[n] for n in model.gate.looks_at])
    log_probs = [each.log_probs for each in every]
    mixed = model.combine(log_probs, weights, model.options)
    model._check_outputs(mixed, log_probs, None)
    return mixed


@dataclass(frozen=True)
class _Drawing:
    """Greedy where `temperature` is None."""

    temperature: float | None
    generator: torch.Generator | None

    def _probs(self, log_probs: torch.Tensor) -> torch.Tensor:
        assert self.temperature is not None
        return (log_probs / self.temperature).softmax(-1)

    def draw(self, log_probs: torch.Tensor) -> torch.Tensor:
        """A token `[1]` of a distribution `[vocabulary]`."""
        if self.temperature is None:
            return log_probs.argmax(-1, keepdim=True)
        return torch.multinomial(self._probs(log_probs), 1, generator=self.generator)

    def keep(self, block: torch.Tensor, mixed: torch.Tensor, told: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The tokens that follow: the drafts that are kept and, after the first that is not, one in its place."""
        if self.temperature is None:
            best = mixed.argmax(-1)
            same = int((best == block).long().cumprod(0).sum())
            return best[: same + 1], same
        ours, theirs = self._probs(mixed), self._probs(told)
        for at, token in enumerate(block.tolist()):
            chance = torch.rand((), generator=self.generator, device=ours.device)
            if chance * theirs[at, token] >= ours[at, token]:
                rest = (ours[at] - theirs[at]).clamp(min=0)
                rest = rest if float(rest.sum()) > 0 else ours[at]
                other = torch.multinomial(rest, 1, generator=self.generator)
                return torch.cat([block[:at], other]), at
        return block, len(block)
