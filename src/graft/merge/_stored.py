"""Elements from stored bits to float32 and back, for kernels."""

# numba infers types, and what it makes of a function is called otherwise than the function
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

from graft.merge._instructions import as_bits, as_float, float_to_half, half_to_float
from graft.pointers import P16, P32, U16, U32, get, inlined, put

STORED = {"BF16": P16, "F16": P16, "F32": P32}
"""Stored types that kernels know, and pointers to whole numbers of their width."""
INFINITE = {"BF16": U32(0x7F80), "F16": U32(0x7C00), "F32": U32(0x7F800000)}
"""The bits of infinity; those of NaN are above."""
MAGNITUDE = {"BF16": U16(0x7FFF), "F16": U16(0x7FFF), "F32": U32(0x7FFFFFFF)}
"""All bits but that of the sign."""


@inlined
def _widen_bf16(bits):
    return as_float(U32(bits) << U32(16))


@inlined
def _narrow_bf16(value):
    # to the nearest, ties to even; there is no NaN
    bits = as_bits(value)
    return U16((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16))


WIDEN = {"BF16": _widen_bf16, "F16": half_to_float, "F32": as_float}
NARROW = {"BF16": _narrow_bf16, "F16": float_to_half, "F32": as_bits}


@inlined
def _as_it_is(bits):
    return bits


@inlined
def _alone(value, others, j):
    return value


@inlined
def _less(value, others, j):
    return value - get(others, j)


def reading(stored: str) -> Any:
    """into[0:size] = the elements of `raw`; returns the largest bits without their sign."""
    moved = _moving(_as_it_is, WIDEN[stored], _alone, MAGNITUDE[stored])

    @inlined
    def read(raw, size, into):
        return moved(raw, raw, size, into)

    return read


def reading_deltas(stored: str) -> Any:
    """into[0:size] = the elements of `raw` minus those of the base; returns the largest bits without their sign."""
    return _moving(_as_it_is, WIDEN[stored], _less, MAGNITUDE[stored])


def writing(made: str) -> Any:
    """out[0:size] = values; returns the largest bits without their sign."""
    moved = _moving(NARROW[made], _as_it_is, _alone, MAGNITUDE[made])

    @inlined
    def write(values, size, out):
        return moved(values, values, size, out)

    return write


def _moving(to_bits: Any, from_bits: Any, beside: Any, positive: Any) -> Any:
    """into[0:size] = `from_bits` of what `to_bits` makes of the elements, put together with others by `beside`."""

    @inlined
    def move(elements, others, size, into):
        worst = U32(0)
        for j in range(size):
            bits = to_bits(get(elements, j))
            worst = max(worst, U32(bits & positive))
            put(into, j, beside(from_bits(bits), others, j))
        return worst

    return move
