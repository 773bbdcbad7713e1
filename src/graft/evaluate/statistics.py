"""How sure a score is, and whether two models differ: bootstraps, Wilson's interval, McNemar's test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

CONFIDENCE = 0.95
DRAWS = 2000

Score = Callable[[np.ndarray], np.ndarray]
"""From how often each item was drawn, `[draws, items]`, to the score of each draw, `[draws]`."""


def bootstrap(
    score: Score, items: int, seed: int, *, draws: int = DRAWS, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """(low, high) of the percentile bootstrap over items (Efron 1979); of one item nothing is known: (nan, nan)."""
    if items < 2:
        return float("nan"), float("nan")
    return _ends(redrawn([score], items, seed, draws=draws)[0], confidence)


def redrawn(scores: Sequence[Score], items: int, seed: int, *, draws: int = DRAWS) -> np.ndarray:
    """[scores, draws]: each score on the same resampled items, which are drawn once for all of them."""
    blocks = [[score(counts) for score in scores] for counts in _resamples(items, seed, draws)]
    return np.concatenate(blocks, axis=1)


def paired(
    first: np.ndarray, second: np.ndarray, items: int, *, confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """(low, high, p) of first - second, two scores `[draws]` on the same resampled items (Koehn 2004).

    p is two-sided: twice the share of draws in which the difference does not have the sign that it mostly has, with one
    added to both counts so that it is never zero. It is never below 2^(1 - items), the least that a test which only
    knows which of two models is ahead on each item could give: a bootstrap of a few items does not know what it lacks.
    """
    differences = first - second
    below, above = (differences <= 0).sum(), (differences >= 0).sum()
    p = max(2 * (min(below, above) + 1) / (len(differences) + 1), 2.0 ** (1 - items))
    return *_ends(differences, confidence), float(min(1.0, p))


def _ends(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resamples(items: int, seed: int, draws: int) -> Iterator[np.ndarray]:
    """How often each item is drawn, in blocks `[some draws, items]` that stay small; float64 for exact sums."""
    random = np.random.default_rng([seed, items])
    block = max(1, min(draws, 4_000_000 // items))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        yield random.multinomial(items, np.full(items, 1 / items), size=size).astype(np.float64)


def wilson(successes: float, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """(low, high) for a proportion (Wilson 1927)."""
    from scipy.stats import norm

    if trials == 0:
        return float("nan"), float("nan")
    z = float(norm.ppf((1 + confidence) / 2))
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def unvaried(
    value: float, items: int, bounds: tuple[float, float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """(low, high) where all items agree, so that every resample scores `value` and a bootstrap has no width.

    Of as many items as were seen without an exception, a share that Wilson's interval for 0 of `items` still holds may
    be exceptions (about 3.8 / items; Hanley & Lippman-Hand 1983 take 3 / items, for one side), and these may score
    anything within `bounds`.
    """
    share = wilson(0, items, confidence)[1]
    low, high = ((1 - share) * value + share * bound for bound in bounds)
    return low, high


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p of McNemar's exact test (1947): `first`, `second` [items] bool, right or wrong on the same items."""
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)
