"""How differently candidates err, and what a mixture would gain from one more, before any ensemble is run.

All from what each candidate alone gave a text: its log-probability of the token that came, or its best token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graft.ensemble.weights import fit_linear


def error_correlation(log_probs: np.ndarray) -> np.ndarray:
    """Pearson correlation `[members, members]` of the surprise at each token, from `log_probs [members, tokens]`.

    NaN for a candidate that is equally surprised everywhere, and where a token has probability zero.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(log_probs))


def disagreement(best: np.ndarray) -> np.ndarray:
    """Share of tokens `[members, members]` at which the likeliest tokens differ: `best [members, tokens]`."""
    return (best[:, None] != best[None]).mean(-1)


def predicted_gain(
    log_probs: np.ndarray, members: Sequence[int], candidate: int, importance: np.ndarray | None = None
) -> float:
    """Nats a token that the fitted mixture of `members` gains from `candidate`, all weights fitted anew.

    `log_probs [candidates, tokens]`. Raises ValueError for no members and for a candidate that is one already.
    """
    if not members or candidate in members:
        raise ValueError(f"expected members and a candidate that is none of them, found {list(members)}, {candidate}")
    now = fit_linear(log_probs[list(members)], importance)
    then = fit_linear(log_probs[[*members, candidate]], importance)
    return now.loss - then.loss
