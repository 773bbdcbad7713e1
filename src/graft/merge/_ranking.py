"""The elements of a row by growing magnitude, for kernels: in buckets, or where these are crowded by digits."""

# numba infers types, and what it makes of a function is called otherwise than the function
# mypy: ignore-errors

from __future__ import annotations

from graft.merge._blocks import BUCKETS
from graft.merge._instructions import as_bits, as_float
from graft.pointers import F32, I32, I64, U32, U64, get, inlined, put

PATIENCE = 8
"""Steps an element, in sorting a row within its buckets, before it is sorted otherwise."""


@inlined
def _magnitude(values, place):
    """The bits of |value|, which order as it does."""
    return as_bits(get(values, place)) & U32(0x7FFFFFFF)


@inlined
def order_of(values, n, keys, turns, counts, order, other):
    """order[0:n]: magnitude's bits, then the place, of all values by growing magnitude, equal ones by place.

    keys and turns: n, counts: BUCKETS n + 257, other: n.
    """
    buckets = BUCKETS * n
    most = U32(0)
    for j in range(n):
        most = max(most, _magnitude(values, j))
    top = as_float(most)
    # x / (x + bend), written so that rounding cannot turn two values around, spreads what crowds about zero
    bend = top * F32(0.2) if top > F32(1e-30) else F32(1)
    reach = F32(buckets - 1) / (F32(1) - bend / (top + bend)) if top > F32(1e-30) else F32(0)
    for b in range(buckets):
        put(counts, b, U32(0))
    for j in range(n):
        # by way of 32 bits with a sign, which processors make of many numbers at once
        put(keys, j, U32(I32((F32(1) - bend / (abs(get(values, j)) + bend)) * reach)))
    for j in range(n):
        key = I64(get(keys, j))
        turn = get(counts, key)
        put(turns, j, turn)
        put(counts, key, turn + U32(1))
    before = U32(0)
    for b in range(buckets):
        own = get(counts, b)
        put(counts, b, before)
        before += own
    for j in range(n):
        put(order, I64(get(counts, I64(get(keys, j))) + get(turns, j)), _packed(values, j))
    moved = I64(0)
    for i in range(1, n):
        own = get(order, i)
        j = i - 1
        while j >= 0 and get(order, j) > own:
            put(order, j + 1, get(order, j))
            j -= 1
        put(order, j + 1, own)
        moved += i - 1 - j
        if moved > PATIENCE * n:
            _by_digits(values, n, counts, order, other)
            return


@inlined
def _packed(values, place):
    return (U64(_magnitude(values, place)) << U64(32)) | U64(place)


@inlined
def _by_digits(values, n, counts, order, other):
    """The same, digit by digit of the magnitude's bits: for rows of which most elements are in few buckets."""
    for j in range(n):
        put(order, j, _packed(values, j))
    for digit in range(4, 8):
        shift = U64(8 * digit)
        for b in range(257):
            put(counts, b, U32(0))
        for j in range(n):
            key = I64((get(order, j) >> shift) & U64(255)) + 1
            put(counts, key, get(counts, key) + U32(1))
        for b in range(1, 257):
            put(counts, b, get(counts, b) + get(counts, b - 1))
        for j in range(n):
            own = get(order, j)
            key = I64((own >> shift) & U64(255))
            put(other, I64(get(counts, key)), own)
            put(counts, key, get(counts, key) + U32(1))
        for j in range(n):
            put(order, j, get(other, j))
