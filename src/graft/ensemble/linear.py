"""Linear interpolation: a mixture of the members' probabilities, p(y) = Σ λᵢ pᵢ(y) (Jelinek and Mercer 1980).

An OR: what one member allows stays possible, even where another gives it probability zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graft import settings

if TYPE_CHECKING:
    import torch


class Settings(settings.Settings):
    """A mixture has no options."""


def default(members: int, options: Settings) -> list[float]:
    """Equal weights."""
    return [1 / members] * members


def combine(log_probs: Sequence[torch.Tensor], weights: torch.Tensor, options: Settings) -> torch.Tensor:
    """log Σ λᵢ exp(log_probsᵢ): each `[..., vocabulary] float32`, normalised; `weights [..., members]` sum to one.

    Computed in log space, so exact where a member gives zero and down to the smallest probabilities.
    """
    import torch

    if not (torch.is_grad_enabled() and any(each.requires_grad for each in (*log_probs, weights))):
        return _mixed(log_probs, weights.log())
    shares = weights.log()
    mixed = log_probs[0] + shares[..., :1]
    for place, other in enumerate(log_probs[1:], start=1):
        mixed = _log_add(mixed, other + shares[..., place : place + 1])
    return mixed


NEAR = 1 << 18
"""Numbers that are mixed at once on a processor: what is made of them on the way stays in its cache."""


def _mixed(log_probs: Sequence[torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
    """The same without a gradient: `shares` are the logs of the weights."""
    import torch

    width = log_probs[0].shape[-1]
    mixed = torch.empty_like(log_probs[0], memory_format=torch.contiguous_format)
    out, rows = mixed.view(-1, width), [each.reshape(-1, width) for each in log_probs]
    each = shares.expand(*mixed.shape[:-1], -1).reshape(-1, len(rows))
    step = max(1, NEAR // width if mixed.device.type == "cpu" else len(out))
    for start in range(0, len(out), step):
        piece = slice(start, start + step)
        torch.add(rows[0][piece], each[piece, :1], out=out[piece])
        for place, other in enumerate(rows[1:], start=1):
            torch.logaddexp(out[piece], other[piece] + each[piece, place : place + 1], out=out[piece])
    return mixed


def _log_add(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """log(exp(first) + exp(second)), with a gradient of zero rather than NaN where both are -inf."""
    import torch

    both_zero = (first == -math.inf) & (second == -math.inf)
    low = torch.finfo(first.dtype).min
    safe = first.masked_fill(both_zero, low).logaddexp(second.masked_fill(both_zero, low))
    return safe.masked_fill(both_zero, -math.inf)


def problem(weights: Sequence[float]) -> str | None:
    """What is wrong with these weights for a mixture, or None."""
    if any(w < 0 for w in weights):
        return f"a mixture needs weights of zero or more, found {list(weights)}; log_linear allows negative ones"
    total = sum(weights)
    if abs(total - 1) > 1e-6:
        hint = f"; normalised they are {[round(w / total, 6) for w in weights]}" if total > 0 else ""
        return f"the weights of a mixture must sum to one, found {list(weights)}, which sum to {total:g}{hint}"
    return None
