"""Whether two checkpoints without a manifest grew from one initialisation: judged by a sample of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graft.checkpoint import FLOATS, TensorReader

MATRICES, VALUES = 24, 1 << 16
"""So many matrices are looked at, and so many values of each."""
RELATED = 0.1
"""Correlation above which two models are of one family. Tuning leaves it near 1; between independent initialisations it
is about 1/√values for each matrix."""


def correlation(a: TensorReader, b: TensorReader, places: Sequence[Mapping[str, str]], names: tuple[str, str]) -> float:
    """Median over matrices of the correlation between the values of two models at the same places.

    `places` says what each tensor is called in each model; vectors (norms, biases) look alike in all models and are
    left out. 1 where there is no matrix to compare.
    """
    first, second = names
    matrices = [p for p in places if first in p and second in p and _is_matrix(a, p[first])]
    found = []
    for place in matrices[:: max(len(matrices) // MATRICES, 1)]:
        x, y = _sample(a, place[first]), _sample(b, place[second])
        spread = x.std() * y.std()
        if spread > 0:
            found.append(float(((x - x.mean()) * (y - y.mean())).mean() / spread))
    return float(np.median(found)) if found else 1.0


def same_names(readers: Mapping[str, TensorReader]) -> list[dict[str, str]]:
    """Places of tensors that have one name and shape wherever they are: for layers that are about to change places."""
    names = sorted({name for reader in readers.values() for name in reader.headers})
    places = [{model: name for model, reader in readers.items() if name in reader.headers} for name in names]
    shapes = [{readers[model].headers[name].shape for model, name in place.items()} for place in places]
    return [place for place, found in zip(places, shapes, strict=True) if len(found) == 1]


def _is_matrix(reader: TensorReader, name: str) -> bool:
    header = reader.headers[name]
    return len(header.shape) > 1 and header.dtype in FLOATS


def _sample(reader: TensorReader, name: str) -> np.ndarray:
    """Values from the middle of a tensor, float64."""
    count = reader.headers[name].count
    size = min(VALUES, count)
    return reader.read(name, (count - size) // 2, size).double().numpy()
