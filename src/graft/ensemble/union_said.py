"""What members of several vocabularies say of a text in the tokens of their union, one member in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graft import models
from graft.data.encode import encode
from graft.ensemble.members import home_of
from graft.ensemble.sources import Source
from graft.ensemble.union import Union, union_of, unmatched_mass
from graft.evaluate.scorer import Scorer


@dataclass(frozen=True)
class UnionSaid:
    """`log_probs [members, tokens] float64` of the union's tokens that come, of the texts `texts [tokens]`; how many
    `tokens` the union has; `unmatched [members]`: the mean mass on tokens that not all members have."""

    log_probs: np.ndarray
    texts: np.ndarray
    tokens: int
    unmatched: list[float]


def union_said(sources: Sequence[Source], texts: Sequence[str], device: str | None = None) -> UnionSaid:
    """What each member says of the texts, each cut to what all members can read.

    Raises CannotCombine for tokenizers whose strings cannot be matched.
    """
    tokenizers = [models.load_tokenizer(home_of(source.folder)) for source in sources]
    union = union_of(tokenizers)
    ids = [list(each) for each in encode(list(texts), tokenizers[0])]
    told = [_said(union, place, source, ids, tokenizers[0], device) for place, source in enumerate(sources)]
    lengths = [min(len(each[0][place]) for each in told) for place in range(len(ids))]
    log_probs = [np.concatenate([own[:n] for own, n in zip(each[0], lengths, strict=True)]) for each in told]
    at = np.repeat(np.arange(len(ids)), lengths)
    return UnionSaid(np.stack(log_probs), at, len(union.tokens), [float(np.mean(each[1])) for each in told])


@torch.inference_mode()
def _said(
    union: Union, place: int, source: Source, texts: Sequence[Sequence[int]], tokenizer: Any, device: str | None
) -> tuple[list[np.ndarray], list[float]]:
    """Of each text the log-probabilities of its tokens, as many as the member can read, and the mass not all have."""
    scorer = Scorer(source.load(device), tokenizer)
    found: list[np.ndarray] = []
    masses: list[float] = []
    for ids in texts:
        if not ids:
            found.append(np.zeros(0))
            continue
        given = torch.tensor([[scorer.prefix_token, *ids[:-1]]])
        own, mask, ends = union.cut(place, given, None)
        ends = ends[0][ends[0] < scorer.context]
        own, mask = own[:, : int(ends[-1]) + 1], mask[:, : int(ends[-1]) + 1]
        logits = scorer.model(
            input_ids=own.to(scorer.device), attention_mask=mask.to(scorer.device), use_cache=False
        ).logits
        log_probs = union.spread(logits[0, ends.to(scorer.device)], place).cpu()
        gold = torch.tensor(ids[: len(ends)])[:, None]
        found.append(log_probs.gather(-1, gold)[:, 0].double().numpy())
        masses += unmatched_mass(union, [log_probs])
    return found, masses
