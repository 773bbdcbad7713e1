"""Random numbers for kernels: those of `_random`."""

# numba infers types, and what it makes of a function is called otherwise than the function
# mypy: ignore-errors

from __future__ import annotations

from graft.merge._blocks import DRAWN
from graft.pointers import U32, U64, behind, inlined, put


@inlined
def _philox(counter, key0, key1, into):
    """64 numbers of 32 bits: word w of counter c lies at 16 w + c. Philox 4×32, ten rounds, Salmon et al. 2011."""
    for lane in range(16):
        at = U64(counter) * U64(16) + U64(lane)
        x0, x1, x2, x3 = U32(at), U32(at >> U64(32)), U32(0), U32(0)
        k0, k1 = key0, key1
        for _ in range(10):
            a, b = U64(x0) * U64(0xD2511F53), U64(x2) * U64(0xCD9E8D57)
            x0, x2 = U32(b >> U64(32)) ^ x1 ^ k0, U32(a >> U64(32)) ^ x3 ^ k1
            x1, x3 = U32(b), U32(a)
            k0, k1 = U32(k0 + U32(0x9E3779B9)), U32(k1 + U32(0xBB67AE85))
        put(into, lane, x0)
        put(into, lane + 16, x1)
        put(into, lane + 32, x2)
        put(into, lane + 48, x3)


@inlined
def draw(start, size, key0, key1, into):
    """The numbers of `size` elements from `start`; returns where in `into` the first one lies."""
    first = start // DRAWN
    last = (start + size - 1) // DRAWN
    for group in range(first, last + 1):
        _philox(group, key0, key1, behind(into, (group - first) * DRAWN))
    return start - first * DRAWN
