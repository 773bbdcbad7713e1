"""What a mixture of some models would gain, and from whom, before any ensemble is made: `graft gains`.

Each candidate reads the text once, alone. Weights are fitted on one half of the documents and the gain is measured on
the other, so that what is predicted is what an ensemble with these weights will show on new text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.ensemble.diversity import disagreement, error_correlation
from graft.ensemble.weights import fit_linear
from graft.errors import RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType

DRAWS = 1000
"""Resamples of the documents behind an interval."""


@dataclass(frozen=True)
class Step:
    """The mixture when `added` has joined: its weights, its loss on the half that is measured (nats a token), and what
    joining gains there with its 95 % interval over documents. The first has joined nobody: None."""

    added: str
    weights: dict[str, float]
    loss: float
    gain: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Gains:
    """`losses`: of each candidate alone, on the half that is measured; `pairs`: what the mixture of two gains over the
    better of them there; `correlation` of the surprise and `disagreement` of the likeliest tokens, on both halves;
    `steps`: the order in which candidates should join, each the one that gains most on the half that is fitted on."""

    names: tuple[str, ...]
    losses: tuple[float, ...]
    correlation: np.ndarray
    disagreement: np.ndarray
    pairs: np.ndarray
    steps: tuple[Step, ...]
    documents: int
    tokens: int

    def plain(self) -> dict[str, Any]:
        """JSON-ready values."""
        tables = {name: _table(self.names, getattr(self, name)) for name in ("correlation", "disagreement", "pairs")}
        return {
            "losses": dict(zip(self.names, self.losses, strict=True)),
            **tables,
            "steps": [asdict(step) for step in self.steps],
            "documents": self.documents,
            "tokens": self.tokens,
        }


def _table(names: Sequence[str], values: np.ndarray) -> dict[str, dict[str, float | None]]:
    finite = np.where(np.isfinite(values), values, np.nan)
    rows = [[None if np.isnan(value) else float(value) for value in row] for row in finite]
    return {name: dict(zip(names, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def gains(names: Sequence[str], log_probs: np.ndarray, best: np.ndarray, texts: np.ndarray, seed: int = 0) -> Gains:
    """From what each candidate gives alone: `log_probs [candidates, tokens]` of the tokens that come, its likeliest
    tokens `best [candidates, tokens]`, and the document `texts [tokens]` that each token is from.

    Raises RequestError for fewer than two candidates or documents.
    """
    if len(names) < 2 or len(np.unique(texts)) < 2:
        raise RequestError(
            f"expected two models or more and two documents or more, found {len(names)} and {len(np.unique(texts))}"
        )
    fitted_on = texts % 2 == 0
    fit, measured = log_probs[:, fitted_on], log_probs[:, ~fitted_on]
    losses = -measured.mean(1)
    pairs = np.zeros((len(names), len(names)))
    for a, b in itertools.combinations(range(len(names)), 2):
        mixed = mixture(measured[[a, b]], fit_linear(fit[[a, b]]).weights)
        pairs[a, b] = pairs[b, a] = mixed.mean() + min(losses[a], losses[b])
    return Gains(
        tuple(names),
        tuple(map(float, losses)),
        error_correlation(log_probs),
        disagreement(best),
        pairs,
        tuple(_steps(names, fit, measured, texts[~fitted_on], seed)),
        len(np.unique(texts)),
        log_probs.shape[1],
    )


def mixture(log_probs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log Σ λᵢ pᵢ of each token, `[tokens]`, from `[members, tokens]`; exact where a probability is zero."""
    with np.errstate(divide="ignore"):
        return np.logaddexp.reduce(log_probs + np.log(weights)[:, None], axis=0)


def _steps(names: Sequence[str], fit: np.ndarray, measured: np.ndarray, texts: np.ndarray, seed: int) -> list[Step]:
    """Forward selection: the best single candidate, then again and again the one that lowers the fitted loss most."""
    joined, found = [int(fit.mean(1).argmax())], []
    now = measured[joined[0]]
    found.append(Step(names[joined[0]], {names[joined[0]]: 1.0}, -float(now.mean())))
    while len(joined) < len(names):
        rest = [place for place in range(len(names)) if place not in joined]
        fits = {place: fit_linear(fit[[*joined, place]]) for place in rest}
        joined.append(min(rest, key=lambda place: fits[place].loss))
        weights = fits[joined[-1]].weights
        then = mixture(measured[joined], weights)
        low, high = interval(then - now, texts, seed)
        shares = {names[place]: float(weight) for place, weight in zip(joined, weights, strict=True)}
        gain = float((then - now).mean())
        found.append(Step(names[joined[-1]], shares, -float(then.mean()), gain, low, high))
        now = then
    return found


def interval(
    gain: np.ndarray, texts: np.ndarray, seed: int, importance: np.ndarray | None = None
) -> tuple[float, float]:
    """95 % of the mean `gain [tokens]` when documents (`texts [tokens]`) are drawn anew (percentile bootstrap).

    `importance [tokens]`: how much each token counts; all alike where None.
    """
    _, at = np.unique(texts, return_inverse=True)
    counts = np.ones(len(gain)) if importance is None else importance
    sums, counts = np.bincount(at, gain * counts), np.bincount(at, counts)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def render(found: Gains) -> RenderableType:
    """For the terminal: who should join in which order, then the pairs."""
    from rich.console import Group
    from rich.table import Table

    order = Table("joins", "loss", "gain, nats a token", "weights", title=_title(found), title_justify="left", box=None)
    for step in found.steps:
        gain = "" if step.gain is None else f"{step.gain:+.4f}  ({step.low:+.4f} to {step.high:+.4f})"
        weights = "  ".join(f"{name} {weight:.2f}" for name, weight in step.weights.items())
        order.add_row(step.added, f"{step.loss:.4f}", gain, weights)
    table = Table("pair", "gain", "correlation of surprise", "best tokens differ", box=None)
    for a, b in itertools.combinations(range(len(found.names)), 2):
        shown = (f"{each[a, b]:.3f}" for each in (found.correlation, found.disagreement))
        table.add_row(f"{found.names[a]}, {found.names[b]}", f"{found.pairs[a, b]:+.4f}", *shown)
    return Group(order, "", table)


def _title(found: Gains) -> str:
    return (
        f"mixtures of {len(found.names)} models, predicted from {found.tokens} tokens of {found.documents} documents: "
        "fitted on half, measured on the other"
    )
