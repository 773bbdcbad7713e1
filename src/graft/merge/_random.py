"""Random numbers that belong to an element: the same for a seed, however the tensor is cut into pieces."""

from __future__ import annotations

import hashlib

import numpy as np

from graft.merge import _fused
from graft.merge._blocks import DRAWN

LANES = DRAWN // 4
"""Counters whose words lie together: word w of counter c is number 16 w + c mod 16 of its 64."""
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
ROUNDS = 10


def below(seed: int, tensor: str, model: str, start: int, count: int, share: float) -> np.ndarray:
    """Bool array: for each of `count` elements from `start`, true with probability `share` (in steps of 2⁻³²)."""
    return uniform(seed, tensor, model, start, count) < round(share * 2**32)


def uniform(seed: int, tensor: str, model: str, start: int, count: int) -> np.ndarray:
    """uint32: one an element (Philox, keyed by seed, tensor and model)."""
    if not count:
        return np.zeros(0, np.uint32)
    own = key(seed, tensor, model)
    found = _fused.draws(start, count, own)
    return plain(start, count, own) if found is None else found


def key(seed: int, tensor: str, model: str) -> np.ndarray:
    """[2] uint32: which numbers belong to a tensor of a model."""
    return np.frombuffer(hashlib.sha256(f"{seed}\0{tensor}\0{model}".encode()).digest()[:8], dtype="<u4")


def plain(start: int, count: int, own: np.ndarray) -> np.ndarray:
    """The numbers of `count` elements from `start`, without a compiler."""
    first, last = start // DRAWN, (start + count - 1) // DRAWN
    words = philox(np.arange(first * LANES, (last + 1) * LANES, dtype=np.uint64), own)
    numbers = words.reshape(4, -1, LANES).swapaxes(0, 1).reshape(-1)
    return numbers[start - first * DRAWN :][:count]


def philox(counters: np.ndarray, own: np.ndarray) -> np.ndarray:
    """[4, n] uint32: the words of Philox 4×32 with ten rounds at these counters [n] uint64, whose upper half is zero.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low, high = (lambda x: x.astype(np.uint32)), (lambda x: (x >> np.uint64(32)).astype(np.uint32))
    x0, x1 = low(counters), high(counters)
    x2, x3 = np.zeros_like(x0), np.zeros_like(x0)
    k0, k1 = own[:1].copy(), own[1:].copy()
    for _ in range(ROUNDS):
        a, b = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = high(b) ^ x1 ^ k0, low(b), high(a) ^ x3 ^ k1, low(a)
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return np.stack([x0, x1, x2, x3])
