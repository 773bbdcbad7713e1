"""What merges do to every element, from stored bits to stored bits: compiled by numba, called from `_compiled`.

A kernel works on a piece in blocks that stay in a core's nearest cache: widen, subtract, drop, elect, add and narrow
of one block are done before the next one is read. Arithmetic is that of the torch functions of the same names,
operation by operation (a sum with a factor is one fused multiply-add in both), so that both give the same bytes.

`raw` is [1 + m or m, stride]: the base, where there is one, and the models, of which the first `n` elements count. A
kernel returns 0, or 1 where it met NaN or Inf. Memory is pointers, read by `get` and written by `put`.
"""

# numba infers types, and what it makes of a function is called otherwise than the function
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graft.merge._blocks import BLOCK, CUT, DRAWN, DROPPED, LANES, RANKED
from graft.merge._drawing import draw
from graft.merge._instructions import add_products, as_bits, as_float, fma, gather_lanes
from graft.merge._ranking import order_of
from graft.merge._stored import INFINITE, STORED, reading, reading_deltas, writing
from graft.pointers import F32, I64, P32, P64, PD, PF, PI, U32, U64, behind, get, inlined, put

Kernel = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and the types of its arguments; it gives an int64."""


def weighted_sum(stored: str, made: str) -> Kernel:
    """out = Σ w_m θ_m: `weighted_sum` of linear, `add_up` without a base. `scratch`: 2 BLOCK."""
    read, write = reading(stored), writing(made)
    bad, bad_out = INFINITE[stored], INFINITE[made]

    def kernel(raw, stride, m, n, weights, scratch, out):
        own = behind(scratch, BLOCK)
        for start in range(0, n, BLOCK):
            size = min(BLOCK, n - start)
            worst = U32(0)
            for k in range(m):
                worst = max(worst, read(behind(raw, k * stride + start), size, own))
                w = get(weights, k)
                if k == 0:
                    for j in range(size):
                        put(scratch, j, get(own, j) * w)
                else:
                    for j in range(size):
                        put(scratch, j, fma(get(own, j), w, get(scratch, j)))
            if worst >= bad or write(scratch, size, behind(out, start)) >= bad_out:
                return 1
        return 0

    return kernel, (STORED[stored], I64, I64, I64, PF, PF, STORED[made])


def draws(stored: str, made: str) -> Kernel:
    """out = the numbers of `n` elements from `start` (see `_random`), in a buffer with 2 DRAWN to spare; returns where
    in it the first one lies."""

    def kernel(start, n, key0, key1, out):
        return draw(start, n, key0, key1, out)

    return kernel, (I64, I64, U32, U32, P32)


@inlined
def _shrink(deltas, size, low, last):
    """Zero where the magnitude is not above `low`, or up to place `last` not above the number before it."""
    before = as_float(as_bits(low) - U32(1)) if low > F32(0) else F32(-1)
    upto = min(max(last + 1, 0), size)
    for j in range(upto):
        x = get(deltas, j)
        put(deltas, j, x if abs(x) > before else F32(0))
    for j in range(upto, size):
        x = get(deltas, j)
        put(deltas, j, x if abs(x) > low else F32(0))


@inlined
def _keep(deltas, size, drawn, limit, gain):
    """Zero where the draw is not below the limit, else times the gain."""
    for j in range(size):
        put(deltas, j, get(deltas, j) * (gain if get(drawn, j) < limit else F32(0)))


@inlined
def _keep_by_rank(deltas, size, row, drawn, limits, gains, keys, turns, counts, order, other, factor):
    """In every row, the draw at a rank's place keeps the element of that rank or not."""
    for begin in range(0, size, row):
        own, lots = behind(deltas, begin), behind(drawn, begin)
        order_of(own, row, keys, turns, counts, order, other)
        for r in range(row):
            # read in any case: a jump that chance decides takes longer than all else here
            gain = get(gains, r)
            kept = gain if get(lots, r) < get(limits, r) else F32(0)
            put(factor, I64(get(order, r) & U64(0xFFFFFFFF)), kept)
        for j in range(row):
            put(own, j, get(own, j) * get(factor, j))


@inlined
def _sum(deltas, m, block, size, weights, divisor, total):
    for k in range(m):
        own, w = behind(deltas, k * block), get(weights, k)
        if k == 0:
            for j in range(size):
                put(total, j, get(own, j) * w)
        else:
            for j in range(size):
                put(total, j, fma(get(own, j), w, get(total, j)))
    if divisor != F32(1):
        for j in range(size):
            put(total, j, get(total, j) / divisor)


@inlined
def _elect(deltas, m, block, size, weights, normalise, total, share, sign):
    least = get(weights, 0)
    for k in range(m):
        own, w = behind(deltas, k * block), get(weights, k)
        least = min(least, w)
        if k == 0:
            for j in range(size):
                x = get(own, j) * w
                put(own, j, x)
                put(sign, j, x)
        else:
            for j in range(size):
                x = get(own, j) * w
                put(own, j, x)
                put(sign, j, get(sign, j) + x)
    for j in range(size):
        put(sign, j, F32(-1) if get(sign, j) < F32(0) else F32(1))
        put(total, j, F32(0))
        put(share, j, F32(0))
    for k in range(m):
        own, w = behind(deltas, k * block), get(weights, k)
        for j in range(size):
            same = max(get(own, j) * get(sign, j), F32(0))
            put(total, j, get(total, j) + same)
            put(share, j, get(share, j) + (w if same > F32(0) else F32(0)))
    for j in range(size):
        put(total, j, get(total, j) * get(sign, j))
    if normalise != 0:
        for j in range(size):
            agree = get(share, j)
            safe = max(agree, least) if least > F32(0) else (F32(1) if agree == F32(0) else agree)
            put(total, j, get(total, j) / safe)


def deltas(stored: str, made: str) -> Kernel:
    """out = θ₀ + λ · together(dropped(θ_m − θ₀)).

    `how` is SUMMED to RANKED for all models; `block` elements are worked on together, whole rows of `row` where RANKED.
    `cuts` [m] and `lasts` [m, in the piece] are for CUT; `keys` [m, 2], `limits` and `gains` [m] for DROPPED, [m, row]
    for RANKED. A model of which everything is kept has a gain of 0. `scratch` has room for (m + 5) · block, `places`
    for (3 + BUCKETS) · block + 257 + 2 · DRAWN, `order` for 2 · block.
    """
    read, read_deltas, write = reading(stored), reading_deltas(stored), writing(made)
    bad, bad_out = INFINITE[stored], INFINITE[made]

    def kernel(
        raw, stride, m, n, start, how, block, row, cuts, lasts, keys, limits, gains,
        weights, elect, normalise, divisor, scale, scratch, places, order, out,
    ):  # fmt: skip
        base, total, share = (
            behind(scratch, m * block), behind(scratch, (m + 1) * block), behind(scratch, (m + 2) * block)
        )  # fmt: skip
        sign, factor = behind(scratch, (m + 3) * block), behind(scratch, (m + 4) * block)
        turns, drawn, other = behind(places, block), behind(places, 2 * block), behind(order, block)
        counts = behind(places, 3 * block + 2 * DRAWN)
        for at in range(0, n, block):
            size = min(block, n - at)
            worst = read(behind(raw, at), size, base)
            for k in range(m):
                own = behind(scratch, k * block)
                worst = max(worst, read_deltas(behind(raw, (k + 1) * stride + at), base, size, own))
            if worst >= bad:
                return 1
            for k in range(m):
                own = behind(scratch, k * block)
                if how == CUT:
                    _shrink(own, size, get(cuts, k), get(lasts, k) - at)
                elif how >= DROPPED and get(gains, k * row) != F32(0):
                    first = draw(start + at, size, get(keys, 2 * k), get(keys, 2 * k + 1), drawn)
                    lots = behind(drawn, first)
                    if how == RANKED:
                        own_limits, own_gains = behind(limits, k * row), behind(gains, k * row)
                        _keep_by_rank(
                            own, size, row, lots, own_limits, own_gains, places, turns, counts, order, other, factor
                        )
                    else:
                        _keep(own, size, lots, get(limits, k), get(gains, k))
            if elect != 0:
                _elect(scratch, m, block, size, weights, normalise, total, share, sign)
            else:
                _sum(scratch, m, block, size, weights, divisor, total)
            for j in range(size):
                put(total, j, fma(get(total, j), scale, get(base, j)))
            if write(total, size, behind(out, at)) >= bad_out:
                return 1
        return 0

    counted = (STORED[stored], I64, I64, I64, I64, I64, I64, I64)
    return kernel, (*counted, PF, PI, P32, P32, PF, PF, I64, I64, F32, F32, PF, P32, P64, STORED[made])


def inner_products(stored: str, made: str) -> Kernel:
    """out [m (m + 1) / 2, LANES] float64 += sums of the products of models i ≥ j, or of their deltas.

    `scratch`: (m + 1) BLOCK.
    """
    read, read_deltas, bad = reading(stored), reading_deltas(stored), INFINITE[stored]

    def kernel(raw, stride, m, n, base, scratch, out):
        below = behind(scratch, m * BLOCK)
        for start in range(0, n, BLOCK):
            size = min(BLOCK, n - start)
            whole = (size + LANES - 1) // LANES * LANES
            worst = U32(0)
            if base != 0:
                worst = read(behind(raw, start), size, below)
            for k in range(m):
                own, there = behind(scratch, k * BLOCK), behind(raw, (k + base) * stride + start)
                if base != 0:
                    worst = max(worst, read_deltas(there, below, size, own))
                else:
                    worst = max(worst, read(there, size, own))
                for j in range(size, whole):
                    put(own, j, F32(0))
            if worst >= bad:
                return 1
            pair = I64(0)
            for i in range(m):
                for k in range(i + 1):
                    a, b = behind(scratch, i * BLOCK), behind(scratch, k * BLOCK)
                    add_products(a, b, whole, behind(out, pair * LANES))
                    pair += 1
        return 0

    return kernel, (STORED[stored], I64, I64, I64, I64, PF, PD)


def magnitudes(stored: str, made: str) -> Kernel:
    """out [m, n] = |θ_m − θ₀|. `scratch`: BLOCK."""
    read, read_deltas, bad = reading(stored), reading_deltas(stored), INFINITE[stored]

    def kernel(raw, stride, m, n, scratch, out):
        for start in range(0, n, BLOCK):
            size = min(BLOCK, n - start)
            worst = read(behind(raw, start), size, scratch)
            for k in range(m):
                own = behind(out, k * n + start)
                worst = max(worst, read_deltas(behind(raw, (k + 1) * stride + start), scratch, size, own))
                for j in range(size):
                    put(own, j, abs(get(own, j)))
            if worst >= bad:
                return 1
        return 0

    return kernel, (STORED[stored], I64, I64, I64, PF, PF)


@inlined
def _gather(values, size, least, most, found):
    """found = the values from `least` to `most`, in their order; returns how many. LANES more need room."""
    to, whole = I64(0), size // LANES * LANES
    for at in range(0, whole, LANES):
        to += gather_lanes(behind(values, at), least, most, behind(found, to))
    for at in range(whole, size):
        value = get(values, at)
        if least <= value and value <= most:
            put(found, to, value)
            to += 1
    return to


def bracketed(stored: str, made: str) -> Kernel:
    """above [m] and inside [m]: how many |θ_m − θ₀| lie above `high`, and from `low` to `high`.

    `found` [m, n + LANES]: those inside, in their order, where low and high are not the same. `scratch`: 2 BLOCK.
    """
    read, read_deltas, bad = reading(stored), reading_deltas(stored), INFINITE[stored]

    def kernel(raw, stride, m, n, low, high, scratch, above, inside, found):
        own = behind(scratch, BLOCK)
        for k in range(m):
            put(above, k, 0)
            put(inside, k, 0)
        for start in range(0, n, BLOCK):
            size = min(BLOCK, n - start)
            worst = read(behind(raw, start), size, scratch)
            for k in range(m):
                worst = max(worst, read_deltas(behind(raw, (k + 1) * stride + start), scratch, size, own))
                least, most = get(low, k), get(high, k)
                larger, equal = U32(0), U32(0)
                for j in range(size):
                    value = abs(get(own, j))
                    put(own, j, value)
                    larger += U32(value > most)
                    equal += U32(value == least)
                put(above, k, get(above, k) + I64(larger))
                if least == most:
                    put(inside, k, get(inside, k) + I64(equal))
                elif least < most:
                    already = get(inside, k)
                    more = _gather(own, size, least, most, behind(found, k * (n + LANES) + already))
                    put(inside, k, already + more)
            if worst >= bad:
                return 1
        return 0

    return kernel, (STORED[stored], I64, I64, I64, PF, PF, PF, PI, PI, PF)


KERNELS: dict[str, Callable[[str, str], Kernel]] = {
    kernel.__name__: kernel for kernel in (weighted_sum, deltas, inner_products, magnitudes, bracketed, draws)
}
"""Name → what makes a kernel for stored and made types; those that make nothing, or read nothing, ignore the type."""
