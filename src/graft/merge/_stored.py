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


def reading(stored: str) -> Any:
    """into[0:size] = the elements of `raw`; returns the largest bits without their sign."""
    widen, positive = WIDEN[stored], MAGNITUDE[stored]

    @inlined
    def read(raw, size, into):
        worst = U32(0)
        for j in range(size):
            bits = get(raw, j)
            worst = max(worst, U32(bits & positive))
            put(into, j, widen(bits))
        return worst

    return read


def reading_deltas(stored: str) -> Any:
    """into[0:size] = the elements of `raw` minus those of the base; returns the largest bits without their sign."""
    widen, positive = WIDEN[stored], MAGNITUDE[stored]

    @inlined
    def read(raw, base, size, into):
        worst = U32(0)
        for j in range(size):
            bits = get(raw, j)
            worst = max(worst, U32(bits & positive))
            put(into, j, widen(bits) - get(base, j))
        return worst

    return read


def writing(made: str) -> Any:
    """out[0:size] = values; returns the largest bits without their sign."""
    narrow, positive = NARROW[made], MAGNITUDE[made]

    @inlined
    def write(values, size, out):
        worst = U32(0)
        for j in range(size):
            bits = narrow(get(values, j))
            worst = max(worst, U32(bits & positive))
            put(out, j, bits)
        return worst

    return write
