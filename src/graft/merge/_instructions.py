"""Single instructions for kernels that numba has no words for: bits, and a few on several lanes.

An intrinsic is given types and builds instructions of LLVM.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from graft.merge._blocks import LANES
from graft.pointers import F32, I64, PD, PF, U16, U32


def _emits(result: Callable[..., Any], emit: Callable[..., Any]) -> Any:
    """An intrinsic: `result` gives its signature from the types of the arguments, `emit` builds its instructions."""

    @intrinsic
    def one(context: Any, a: Any) -> Any:
        return result(a), lambda context, builder, signature, args: emit(builder, *args)

    return one


as_float = _emits(lambda bits: F32(U32), lambda builder, bits: builder.bitcast(bits, ir.FloatType()))
as_bits = _emits(lambda value: U32(F32), lambda builder, value: builder.bitcast(value, ir.IntType(32)))
half_to_float = _emits(
    lambda bits: F32(U16), lambda builder, bits: builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
)
float_to_half = _emits(
    lambda value: U16(F32),
    lambda builder, value: builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16)),
)


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""
    return F32(F32, F32, F32), lambda context, builder, signature, args: builder.fma(*args)


@intrinsic
def add_products(context: Any, a: Any, b: Any, count: Any, sums: Any) -> Any:
    """sums[l] += a[i] · b[i] for i = l, l + LANES, … below `count`, a multiple of LANES; in float64."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        floats, doubles = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.DoubleType(), LANES)
        a, b, count, sums = args

        def vector(pointer: Any, kind: Any) -> Any:
            loaded = builder.load(builder.bitcast(pointer, kind.as_pointer()))
            loaded.align = 4
            return loaded

        total = cgutils.alloca_once_value(builder, vector(sums, doubles))
        with cgutils.for_range(builder, builder.sdiv(count, count.type(LANES))) as loop:
            at = builder.mul(loop.index, count.type(LANES))
            x, y = (builder.fpext(vector(builder.gep(p, [at]), floats), doubles) for p in (a, b))
            builder.store(builder.fadd(builder.load(total), builder.fmul(x, y)), total)
        builder.store(builder.load(total), builder.bitcast(sums, doubles.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.none(PF, PF, I64, PD), emit


@intrinsic
def gather_lanes(context: Any, values: Any, least: Any, most: Any, found: Any) -> Any:
    """Write those of LANES values that lie from `least` to `most` to `found`, where as many have room; how many."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, least, most, found = args
        floats, flags = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(1), LANES)
        lanes = builder.load(builder.bitcast(values, floats.as_pointer()))
        lanes.align = 4
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)

        def everywhere(value: Any) -> Any:
            first = builder.insert_element(ir.Constant(floats, ir.Undefined), value, ir.IntType(32)(0))
            return builder.shuffle_vector(first, ir.Constant(floats, ir.Undefined), zeros)

        inside = builder.and_(
            builder.fcmp_ordered(">=", lanes, everywhere(least)), builder.fcmp_ordered("<=", lanes, everywhere(most))
        )
        bits = builder.bitcast(inside, ir.IntType(LANES))
        with builder.if_then(builder.icmp_unsigned("!=", bits, bits.type(0)), likely=False):
            kind = ir.FunctionType(floats, [floats, flags, floats])
            name = f"llvm.experimental.vector.compress.v{LANES}f32"
            together = cgutils.get_or_insert_function(builder.module, kind, name)
            packed = builder.call(together, [lanes, inside, ir.Constant(floats, ir.Undefined)])
            builder.store(packed, builder.bitcast(found, floats.as_pointer())).align = 4
        return builder.zext(builder.ctpop(bits), ir.IntType(64))

    return I64(PF, F32, F32, PF), emit
