"""Which tokens may see which: the masks of rows that hold several documents, and of prefixes."""

from __future__ import annotations

import torch


def attention_mask(
    segments: torch.Tensor, *, causal: bool, prefix: torch.Tensor | None = None, additive: torch.dtype | None = None
) -> torch.Tensor:
    """[batch, 1, length, length], True where a query (row) may see a key (column).

    `segments [batch, length]`: tokens see each other only within one; -1 is padding, which sees itself alone. With
    `causal` no token sees later ones, except that tokens of a `prefix [batch, length] bool` see all of it. `additive`
    gives 0 and the smallest number of that dtype instead, for attention that adds its mask.
    """
    length = segments.shape[1]
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    if causal:
        earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()[None]
        seen &= earlier if prefix is None else earlier | (prefix[:, :, None] & prefix[:, None, :])
    seen = (seen | torch.eye(length, dtype=torch.bool, device=segments.device))[:, None]
    if additive is None:
        return seen
    return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill_(~seen, torch.finfo(additive).min)
