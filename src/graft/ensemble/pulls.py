"""How far each member of a product pulls towards what comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graft.ensemble.log_linear import FLOOR


def pulls(told: Sequence[torch.Tensor], mixed: torch.Tensor, weights: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """How far each member of a product pulls towards the tokens that come, in nats, `[tokens, members]`:

        λᵢ (log pᵢ(y) - Σᵥ p(v) log pᵢ(v))

    from `told` and `mixed`, log pᵢ and log p `[tokens, vocabulary]`, `weights [members]` λ and `gold [tokens, 1]` y.
    Where the product allows y, they sum to log p(y) + H(p): how much likelier the token is than those that the product
    would draw. Above zero the member is for the token, as one of negative weight is for what it finds unlikely.
    Probabilities count as at least the smallest normal float32.
    """
    likely = mixed.exp()
    floored = [each.clamp(min=FLOOR) for each in told]
    own = [each.gather(-1, gold)[:, 0] - (likely * each).sum(-1) for each in floored]
    return torch.stack([weight * each for weight, each in zip(weights.tolist(), own, strict=True)], -1)
