"""Memory by pointers, for functions that numba compiles to machine code.

An intrinsic is given types and builds instructions of LLVM.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import intrinsic

U8, U16, U32, U64 = types.uint8, types.uint16, types.uint32, types.uint64
I32, I64, F32, F64 = types.int32, types.int64, types.float32, types.float64
P8, P16, P32, P64, PF, PD, PI = (types.CPointer(kind) for kind in (U8, U16, U32, U64, F32, F64, I64))
inlined = njit(forceinline=True)
"""A function that becomes a part of those that call it."""
called = njit(error_model="numpy", no_cpython_wrapper=True)
"""A function that others call, which need not be compiled again with each of them."""


@intrinsic
def get(context: Any, pointer: Any, place: Any) -> Any:
    """The element of a pointer at a place."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.gep(args[0], [args[1]]))

    return pointer.dtype(pointer, I64), emit


@intrinsic
def put(context: Any, pointer: Any, place: Any, value: Any) -> Any:
    """Write the element of a pointer at a place."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.none(pointer, I64, pointer.dtype), emit


@intrinsic
def behind(context: Any, pointer: Any, count: Any) -> Any:
    """The pointer to what lies `count` elements further."""
    return pointer(pointer, I64), lambda context, builder, signature, args: builder.gep(args[0], [args[1]])


def _to(kind: Any, doc: str) -> Any:
    """An intrinsic: the pointer to elements of a kind at an address."""

    @intrinsic
    def one(context: Any, address: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return kind(I64), emit

    one.__doc__ = doc
    return one


bytes_at = _to(P8, "The uint8 at an address.")
ints_at = _to(PI, "The int64 at an address.")
floats_at = _to(PF, "The float32 at an address.")
doubles_at = _to(PD, "The float64 at an address.")
