"""Interpolation weights fitted to held-out text, without any model in memory.

Each member is run once over the text. A mixture's weights depend on one number for each member and token, the
log-probability of the token that comes; a product's on the whole distributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from graft.ensemble import linear
from graft.ensemble.gate import fit_gate
from graft.ensemble.log_linear import FLOOR
from graft.ensemble.settings import GateSettings


@dataclass(frozen=True)
class Fit:
    """`weights [members]`, the ensemble's mean loss and each member's (nats a token), how many steps, and `gap`: about
    so many nats a token (for a mixture at most) are left to gain."""

    weights: np.ndarray
    loss: float
    members: np.ndarray
    steps: int
    gap: float
    gate: dict[str, Any] | None = None
    """A gate as plain values; `weights` and `loss` are then its, `constant` the loss of the best constant weights."""
    constant: float | None = None
    run: Mapping[int, float] = field(default_factory=dict)
    """Of a gate: the share of the tokens at which each member has a weight and so is needed."""
    correlation: np.ndarray | None = None
    """Of the members' surprise at each token, `[members, members]`, where it was computed."""
    contributions: Sequence[Any] = ()
    """What each member contributes (`contributions.Contribution`); empty where that was not computed. Of a gate, to the
    mixture with the best constant weights."""
    unmatched: Sequence[float] = ()
    """Of a union of vocabularies: the mass that each member gives to tokens which not all members have."""


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


def fit_gated(
    constant: Fit,
    told: torch.Tensor,
    inputs: torch.Tensor,
    importance: np.ndarray,
    settings: GateSettings,
    looks_at: Sequence[int],
    seed: int,
) -> Fit:
    """A gate for a mixture that looks at some members (their places), and what it gives on average.

    `constant`: the best weights that follow no context; `told [members, tokens] float32`: log-probabilities of the
    tokens that come; `inputs [tokens, inputs]`: features of the members it looks at; `importance [tokens]`.
    """
    share = torch.as_tensor(importance, dtype=torch.float32)
    start = torch.as_tensor(constant.weights, dtype=torch.float32)
    conduct = {"looks_at": looks_at, "states": settings.hidden_states, "skip": settings.skip}
    gate = fit_gate(told, inputs, start, share, hidden=settings.units, seed=seed, **conduct)
    with torch.no_grad():
        weights = gate.cut(inputs)
        mixed = linear.combine(list(told[..., None]), weights, linear.Settings())[:, 0]
    share = share / share.sum()
    return replace(
        constant,
        weights=(share @ weights).double().numpy(),
        loss=-float(share @ mixed),
        constant=constant.loss,
        gate=gate.plain(),
        run=dict(enumerate((share @ (weights > 0).float()).tolist())),
    )


def fit_log_linear(
    log_probs: Sequence[torch.Tensor],
    gold: torch.Tensor,
    importance: np.ndarray | None = None,
    *,
    log_counts: torch.Tensor | None = None,
    tolerance: float = 1e-8,
    most_steps: int = 50,
) -> Fit:
    """Weights of a product, negative ones allowed, that minimise the mean of -log p(gold); p ∝ exp(Σ λᵢ log pᵢ).

    `log_probs`: `[tokens, vocabulary] float32` of each member; `gold [tokens]`. The loss is convex (a log-sum-exp less
    a linear term), so Newton's method with halved steps finds its minimum: the product is at most as bad as any member.
    Probabilities below the smallest float32 count as that. `log_counts [tokens, vocabulary]`: the log of how many
    tokens each stands for (one where None), such as all that no member finds likely.
    """
    share = torch.full((len(gold),), 1 / len(gold), dtype=torch.float64)
    if importance is not None:
        share = torch.as_tensor(importance, dtype=torch.float64) / float(np.sum(importance))
    floored = [each.clamp(min=FLOOR) for each in log_probs]
    weights = torch.full((len(floored),), 1 / len(floored), dtype=torch.float64)
    now = _moments(floored, gold, share, weights, log_counts)
    gap, steps = np.inf, 0
    while steps < most_steps:
        step = torch.linalg.lstsq(now.curvature, now.gradient[:, None], driver="gelsd").solution[:, 0]
        slope = float(now.gradient @ step)
        gap = slope / 2
        if gap < tolerance:
            break
        size, then = 1.0, _moments(floored, gold, share, weights - step, log_counts)
        while then.loss > now.loss - 1e-4 * size * slope and size > 1e-6:
            size /= 2
            then = _moments(floored, gold, share, weights - size * step, log_counts)
        weights, now, steps = weights - size * step, then, steps + 1
    alone = [-float(share @ each.gather(-1, gold[:, None])[:, 0].double()) for each in floored]
    return Fit(weights.numpy(), now.loss, np.array(alone), steps, gap)


NEAR = 1 << 19
"""Numbers of a member that are looked at together; at least those of 256 tokens."""


def product_of(
    log_probs: Sequence[torch.Tensor], gold: torch.Tensor, weights: np.ndarray, log_counts: torch.Tensor | None = None
) -> np.ndarray:
    """What a product with these `weights [members]` gives the tokens that come, `[tokens] float64`; the others as of
    `fit_log_linear`."""
    scores = torch.zeros(log_probs[0].shape, dtype=torch.float64)
    for each, weight in zip(log_probs, weights, strict=True):
        scores += float(weight) * each.clamp(min=FLOOR).double()
    given = scores.gather(-1, gold[:, None])[:, 0]
    return (given - (scores if log_counts is None else scores + log_counts).logsumexp(-1)).numpy()


@dataclass(frozen=True)
class _Moments:
    """Mean loss, its gradient `[members]` and second derivatives `[members, members]`."""

    loss: float
    gradient: torch.Tensor
    curvature: torch.Tensor


def _moments(
    log_probs: Sequence[torch.Tensor],
    gold: torch.Tensor,
    share: torch.Tensor,
    weights: torch.Tensor,
    log_counts: torch.Tensor | None = None,
) -> _Moments:
    """The gradient is what the product expects of log pᵢ less what the text gives, the curvature their covariance."""
    loss, members, piece = 0.0, len(log_probs), max(256, NEAR // log_probs[0].shape[-1])
    gradient, curvature = weights.new_zeros(members), weights.new_zeros(members, members)
    for start in range(0, len(gold), piece):
        part = torch.stack(
            [each[start : start + piece] for each in log_probs]
        ).double()  # [members, tokens, vocabulary]
        own, count = gold[start : start + piece], share[start : start + piece]
        scores = torch.einsum("m,mtv->tv", weights, part)
        scores = scores if log_counts is None else scores + log_counts[start : start + piece]
        total = scores.logsumexp(-1)
        found = (scores - total[:, None]).exp()
        given = part.gather(-1, own.expand(members, -1)[..., None])[..., 0]
        expected = torch.einsum("tv,mtv->mt", found, part)
        centred = part - expected[..., None]
        loss += float(count @ (total - weights @ given))
        gradient += (expected - given) @ count
        curvature += torch.einsum("t,tv,mtv,ntv->mn", count, found, centred, centred)
    return _Moments(loss, gradient, curvature)
