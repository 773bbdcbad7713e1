"""Linear interpolation: a mixture of the members' probabilities, p(y) = Σ λᵢ pᵢ(y) (Jelinek and Mercer 1980).

An OR: what one member allows stays possible, even where another gives it probability zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def combine(log_probs: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """log Σ λᵢ exp(log_probsᵢ): each `[..., vocabulary] float32`, normalised; `weights [members] float32` sum to one.

    Computed in log space, so exact where a member gives zero and down to the smallest probabilities; a member whose
    weight is zero does not count, not even where it gives what no other does.
    """
    kept = [lp + weights[place].log() for place, lp in enumerate(log_probs) if weights[place] != 0]
    mixed = kept[0]
    for other in kept[1:]:
        mixed = _log_add(mixed, other)
    return mixed


def _log_add(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """log(exp(first) + exp(second)), with a gradient of zero rather than NaN where both are -inf."""
    low = torch.finfo(first.dtype).min
    both_zero = (first == -torch.inf) & (second == -torch.inf)
    if not both_zero.any():
        return torch.logaddexp(first, second)
    safe = torch.logaddexp(first.masked_fill(both_zero, low), second.masked_fill(both_zero, low))
    return safe.masked_fill(both_zero, -torch.inf)


def problem(weights: Sequence[float]) -> str | None:
    """What is wrong with these weights for a mixture, or None."""
    if any(w < 0 for w in weights):
        return f"a mixture needs weights of zero or more, found {list(weights)}; log_linear allows negative ones"
    total = sum(weights)
    if abs(total - 1) > 1e-6:
        hint = f"; normalised they are {[round(w / total, 6) for w in weights]}" if total > 0 else ""
        return f"the weights of a mixture must sum to one, found {list(weights)}, which sum to {total:g}{hint}"
    return None
