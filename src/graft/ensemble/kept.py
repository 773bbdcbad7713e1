"""What is kept of what members give a text, so that weights can be fitted without them: a few numbers a token.

A mixture needs the log-probability of the token that comes; a gate also what it looks at; a product the likeliest
tokens and the mass of all others, the tail, which is taken to be shared out evenly among the tokens that it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graft import models
from graft.ensemble.gate import features, last_state
from graft.ensemble.reading import BYTES, Item, inputs_of
from graft.ensemble.sources import Source
from graft.evaluate.scorer import Scorer


@dataclass(frozen=True)
class Top:
    """A member's likeliest tokens `ids [tokens, k] int32` with `log_probs [tokens, k]`, and the log of the mass of all
    others but the token that comes, `tail [tokens]`."""

    ids: torch.Tensor
    log_probs: torch.Tensor
    tail: torch.Tensor


@dataclass(frozen=True)
class Kept:
    """`log_probs [tokens]` of the tokens that come, which are `gold [tokens]`, of the texts `texts [tokens]`; `seen
    [tokens, 2]`, entropy and highest log-probability; where they were asked for the last hidden `state [tokens,
    channels]` and the likeliest tokens `top`. All numbers float32."""

    log_probs: torch.Tensor
    gold: torch.Tensor
    texts: torch.Tensor
    seen: torch.Tensor
    state: torch.Tensor | None = None
    top: Top | None = None


def kept_of(
    log_probs: torch.Tensor,
    gold: torch.Tensor,
    texts: torch.Tensor,
    state: torch.Tensor | None = None,
    top_k: int | None = None,
) -> Kept:
    """What is kept of distributions `log_probs [tokens, vocabulary] float32`; `top_k` likeliest tokens where asked."""
    column = gold[:, None]
    own, top = log_probs.gather(-1, column)[:, 0], None
    if top_k is not None:
        found = log_probs.topk(min(top_k, log_probs.shape[-1]))
        rest = log_probs.scatter(-1, found.indices, -torch.inf).scatter(-1, column, -torch.inf)
        top = Top(found.indices.int(), found.values, rest.logsumexp(-1))
    return Kept(own, gold, texts, features([log_probs]), state, top)


def stride_of(items: Sequence[Item], context: int, numbers: int, most: int = BYTES) -> int:
    """Every how many-th token is kept, so that `numbers` float32 at each of them are at most `most` bytes."""
    return max(1, -(-sum(min(len(item.target), context) for item in items) * numbers * 4 // most))


@torch.inference_mode()
def read(
    source: Source,
    items: Sequence[Item],
    *,
    context: int,
    width: int,
    stride: int = 1,
    device: str | None = None,
    states: bool = False,
    top_k: int | None = None,
) -> Kept:
    """What a member gives at every `stride`-th token of the items, each cut to `context` tokens, over `width` tokens of
    vocabulary; on the CPU."""
    scorer = Scorer(source.load(device), models.load_tokenizer(source.folder))
    asked = {"output_hidden_states": True} if states else {}
    parts, seen = [], 0
    for number, item in enumerate(items):
        target = item.target[:context]
        places = torch.arange(-seen % stride, len(target), stride)
        seen += len(target)
        if not len(places):
            continue
        at = places.to(scorer.device)
        found = scorer.model(**inputs_of(scorer, item, target, context), **asked)
        log_probs = found.logits[0, at, :width].float().log_softmax(-1)
        state = last_state(found, source.name)[0, at] if states else None
        gold, text = torch.tensor(target)[places].to(scorer.device), torch.full_like(at, number)
        parts.append(kept_of(log_probs, gold, text, state, top_k))
    return _joined(parts)


def _joined(parts: Sequence[Kept]) -> Kept:
    """The parts one behind the other, on the CPU."""
    states = [each.state for each in parts if each.state is not None]
    tops = [each.top for each in parts if each.top is not None]
    top = Top(_all([t.ids for t in tops]), _all([t.log_probs for t in tops]), _all([t.tail for t in tops]))
    return Kept(
        _all([each.log_probs for each in parts]),
        _all([each.gold for each in parts]),
        _all([each.texts for each in parts]),
        _all([each.seen for each in parts]),
        _all(states) if states else None,
        top if tops else None,
    )


def _all(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts)).cpu() if parts else torch.empty(0)


@dataclass(frozen=True)
class Columns:
    """Tokens that any member finds likely, the one that comes, and the rest as one column behind them.

    `log_probs`: `[tokens, columns]` of each member; `place [tokens]`: the column of the token that comes; `log_counts
    [tokens, columns]`: the log of how many tokens a column stands for (-inf: none).
    """

    log_probs: list[torch.Tensor]
    place: torch.Tensor
    log_counts: torch.Tensor


def columns_of(kept: Sequence[Kept], vocabulary: int) -> Columns:
    """What all members give the tokens that any of them has among its likeliest, out of `vocabulary` tokens.

    A member that has a token in its tail gives it an even part of the tail.
    """
    gold = kept[0].gold[:, None]
    ids = torch.cat([*(_top(each).ids.long() for each in kept), gold], 1).sort(1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    rest = (vocabulary - first.sum(1, keepdim=True)).float()
    log_counts = torch.cat([first.float(), rest], 1).log()
    return Columns([_column(each, ids, vocabulary) for each in kept], (ids == gold).int().argmax(1), log_counts)


def _column(kept: Kept, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """What a member gives the tokens `ids [tokens, columns]`, and behind them each token of the rest."""
    top, gold = _top(kept), kept.gold[:, None]
    ordered = top.ids.long().sort(1)
    at = torch.searchsorted(ordered.values, ids).clamp(max=ordered.values.shape[1] - 1)
    known = ordered.values.gather(1, at) == ids
    own = top.log_probs.gather(1, ordered.indices.gather(1, at))
    among = (top.ids == gold).any(1, keepdim=True)
    others = (vocabulary - top.ids.shape[1] - (~among).float()).clamp(min=1)
    each = top.tail[:, None] - others.log()
    given = torch.where(known, own, torch.where(ids == gold, kept.log_probs[:, None], each))
    return torch.cat([given, each], 1)


def _top(kept: Kept) -> Top:
    assert kept.top is not None
    return kept.top
