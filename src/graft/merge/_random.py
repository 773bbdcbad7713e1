"""Random numbers that belong to an element: the same for a seed, however the tensor is cut into pieces."""

from __future__ import annotations

import hashlib

import numpy as np

DRAWS = 8
"""Numbers of 32 bits in one step of the generator's counter."""


def below(seed: int, tensor: str, model: str, start: int, count: int, share: float) -> np.ndarray:
    """Bool array: for each of `count` elements from `start`, true with probability `share` (in steps of 2⁻³²)."""
    return uniform(seed, tensor, model, start, count) < round(share * 2**32)


def uniform(seed: int, tensor: str, model: str, start: int, count: int) -> np.ndarray:
    """uint64-comparable whole numbers from 0 to 2³² − 1, one an element (Philox, keyed by seed, tensor and model)."""
    name = hashlib.sha256(f"{seed}\0{tensor}\0{model}".encode()).digest()
    key = np.frombuffer(name[:16], dtype=np.uint64)
    first = start // DRAWS
    skipped = start - first * DRAWS
    # the generator's own words, as `random_raw` gives them; but other threads may run meanwhile
    generator = np.random.Generator(np.random.Philox(key=key, counter=first))
    return generator.integers(0, 2**32, size=skipped + count, dtype=np.uint32)[skipped:]
