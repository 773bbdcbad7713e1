"""Interpolation weights fitted to held-out text, without any model in memory.

Each member is run once over the text; one number for each member and token, the log-probability of the token that
comes, is all that a mixture's weights depend on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """`weights [members]`, the mixture's mean loss and each member's (nats a token), how many EM steps, and `gap`: at
    most so many nats a token are left to gain."""

    weights: np.ndarray
    loss: float
    members: np.ndarray
    steps: int
    gap: float


def fit_linear(
    log_probs: np.ndarray, importance: np.ndarray | None = None, *, tolerance: float = 1e-7, most_steps: int = 20_000
) -> Fit:
    """Weights of a mixture that maximise Σₙ importanceₙ log Σᵢ λᵢ exp(log_probs[i, n]), by EM (Jelinek, Mercer 1980).

    `log_probs [members, tokens]`, natural logarithms; `importance [tokens]`, all equal where None. The problem is
    concave, so EM finds the global optimum; it stops when the bound log maxᵢ gᵢ on what is left to gain is below
    `tolerance` (gᵢ is the mean of pᵢ / p, at most 1 at the optimum: Cover 1984).
    """
    log_probs = np.asarray(log_probs, np.float64)
    members, tokens = log_probs.shape
    share = (
        np.full(tokens, 1 / tokens) if importance is None else np.asarray(importance, np.float64) / np.sum(importance)
    )
    top = log_probs.max(0)
    usable = np.isfinite(top)
    if not usable.any():
        raise ValueError("expected some token to which a member gives a probability above zero, found none")
    probs = np.exp(log_probs[:, usable] - top[usable])
    share, top = share[usable] / share[usable].sum(), top[usable]
    weights = np.full(members, 1 / members)
    gap = np.inf
    steps = 0
    while steps < most_steps:
        gain = (probs / (weights @ probs)) @ share
        gap = float(np.log(gain.max()))
        if gap < tolerance:
            break
        weights = weights * gain
        weights /= weights.sum()
        steps += 1
    loss = -float(share @ (np.log(weights @ probs) + top))
    alone = -np.where(np.isinf(log_probs[:, usable]).any(1), -np.inf, log_probs[:, usable] @ share)
    return Fit(weights, loss, alone, steps, gap)
