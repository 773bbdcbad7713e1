"""What the weights of two checkpoints say about each other, from a sample of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from graft.checkpoint import TensorReader
from graft.hashing import hash_weights, way_of
from graft.kinship import sample, statistics
from graft.kinship.sample import comparable
from graft.kinship.statistics import Test
from graft.lineage import read_manifest

ALPHA = 0.001
"""Of unrelated pairs, so many are taken for relatives by chance."""
PAIRED, PAIRED_ALPHA = 64, 0.05
"""So many rows, paired otherwise as seldom as this so well, have not changed places, however far they were trained."""
IN_PLACE = "the same rows of their matrices correlate"
MATCHED_ALPHA, MATCHED = 0.01, 0.2
"""A row has been found again where shuffles seldom do as well, and it goes this far from chance to equality."""

FEW_DRAWS = 9
"""Shuffles that tell about what chance gives, where no p-value is wanted."""
ENOUGH_DRAWS = 999
"""Shuffles whose least p-value is ALPHA."""
TRACE = 0.1
"""Correlation below which so little is left of a common start that the mean of the weights is no model."""


@dataclass(frozen=True)
class Evidence:
    """The verdict of the weights and the test that it rests on."""

    found: Literal["related", "permuted", "unrelated", "incomparable"]
    test: Test | None = None
    what: str = ""

    @property
    def mean_is_a_model(self) -> bool:
        """Whether nothing speaks against the mean of the two: a common start, units in one order, more than a trace."""
        if self.found == "incomparable":
            return True
        return self.found == "related" and self.test is not None and self.test.value >= TRACE


def kin(a: TensorReader, b: TensorReader, *, same_tokens: bool, seed: int = 0) -> Evidence:
    """The verdict of `weigh`, from fewer rows and shuffles where those settle it.

    Where rows of every kind correlate by 1 − MATCHED in place, none can be found again elsewhere by MATCHED more.
    """
    parts = comparable(a.headers, b.headers)
    if parts is not None:
        pairs = [(sample.some_rows(a, name), sample.some_rows(b, name)) for name in sample.kinds(parts.layers)]
        if min(_correlation(*pair) for pair in pairs) >= 1 - MATCHED:
            test = statistics.in_place(statistics.cross(pairs, statistics.FEW), seed, ENOUGH_DRAWS)
            if test.p <= ALPHA:
                return Evidence("related", test, IN_PLACE)
    return weigh(a, b, same_tokens=same_tokens, seed=seed)


def _correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean correlation of rows at the same places."""
    return float((ours * theirs).sum(axis=1).mean())


def weigh(a: TensorReader, b: TensorReader, *, same_tokens: bool, seed: int = 0) -> Evidence:
    """Judge two checkpoints by corresponding rows; where those have nothing in common, by matched ones.

    `same_tokens`: rows of the embeddings stand for the same tokens, and tell which dimension became which.
    """
    parts = comparable(a.headers, b.headers)
    if parts is None:
        return Evidence("incomparable", what="the two store no matrix of the same name and shape")
    test = _in_place(a, b, parts.layers, seed)
    stay = np.arange(parts.width)
    if test.p <= ALPHA:
        moved = _moved(a, b, parts.layers)
        if not moved:
            return Evidence("related", test, IN_PLACE)
        again = _matched(a, b, moved, stay, seed)
        if _is_match(again):
            return Evidence("permuted", again, f"rows of {len(moved)} kinds of matrices stand in another order")
        return Evidence("related", test, IN_PLACE)
    for order in [stay, *([_order(a, b, parts.embedding)] if same_tokens and parts.embedding else [])]:
        again = _matched(a, b, sample.kinds(parts.layers), order, seed)
        if _is_match(again):
            return Evidence("permuted", again, "their rows are found again in another order")
    return Evidence("unrelated", test, "neither the same rows nor matched ones correlate")


def _in_place(a: TensorReader, b: TensorReader, layers: Sequence[str], seed: int) -> Test:
    pairs = (
        (statistics.unit(sample.blocks(a, n)), statistics.unit(sample.blocks(b, n))) for n in sample.spread(layers)
    )
    return statistics.in_place(statistics.cross(pairs), seed)


def _moved(a: TensorReader, b: TensorReader, layers: Sequence[str]) -> list[str]:
    """Matrices whose rows are found again better elsewhere than in place."""
    found = []
    for name in sample.kinds(layers):
        ours, theirs = sample.some_rows(a, name), sample.some_rows(b, name)
        stay = np.arange(ours.shape[1])
        best = statistics.matched([ours], [sample.all_rows(b, name, stay)], draws=FEW_DRAWS)
        elsewhere = best.excess >= MATCHED and _correlation(ours, theirs) < best.value - MATCHED
        if elsewhere and not _pairs_tell(a, b, name):
            found.append(name)
    return found


def _pairs_tell(a: TensorReader, b: TensorReader, name: str) -> bool:
    """Whether rows go better with those at the same places than with any others: then they stand where they stood."""
    count = min(PAIRED, sample.rows_of(a, name))
    ours, theirs = (sample.some_rows(reader, name, count) for reader in (a, b))
    return statistics.in_place(ours @ theirs.T, draws=ENOUGH_DRAWS).p <= PAIRED_ALPHA


def _matched(a: TensorReader, b: TensorReader, names: Sequence[str], order: np.ndarray, seed: int) -> Test:
    some = [sample.some_rows(a, name) for name in names]

    def found(draws: int) -> Test:
        return statistics.matched(some, [sample.all_rows(b, name, order) for name in names], seed, draws)

    # what is no match by its size needs no p-value, which costs the most
    rough = found(FEW_DRAWS)
    return found(statistics.MATCHED_DRAWS) if rough.excess >= MATCHED else rough


def _is_match(test: Test) -> bool:
    return test.p <= MATCHED_ALPHA and test.excess >= MATCHED


def _order(a: TensorReader, b: TensorReader, embedding: str) -> np.ndarray:
    """Which dimension of b is which of a, by how the embeddings of the same tokens vary along it."""
    ours, theirs = (statistics.unit(sample.blocks(r, embedding, sample.TOKENS).T) for r in (a, b))
    return statistics.best_order(ours @ theirs.T)


def same_weights(a: TensorReader, b: TensorReader, folders: tuple[Path, Path]) -> bool:
    """Whether all tensors are the same: by the manifests' hashes; without them a sample first, all bytes last."""
    if {n: (h.dtype, h.shape) for n, h in a.headers.items()} != {n: (h.dtype, h.shape) for n, h in b.headers.items()}:
        return False
    ours, theirs = (read_manifest(folder) for folder in folders)
    if ours is not None and theirs is not None and way_of(ours.hash) == way_of(theirs.hash):
        return ours.hash == theirs.hash
    if not all(_same_start(a, b, name) for name in a.names):
        return False
    return hash_weights(folders[0]) == hash_weights(folders[1])


def _same_start(a: TensorReader, b: TensorReader, name: str, size: int = 1 << 12) -> bool:
    count = min(size, a.headers[name].end - a.headers[name].start)
    ours, theirs = bytearray(count), bytearray(count)
    a.read_into(name, 0, memoryview(ours))
    b.read_into(name, 0, memoryview(theirs))
    return ours == theirs
