"""Machine code of functions over pointers: made once by numba, kept for all runs, loaded without it.

What is kept belongs to the text of the functions, the versions of the compiler and the processor. Where numba is
missing or cannot work, or nothing may be kept, there is none, and what would call it goes its plain way.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from graft import remembered

Compiled = Callable[..., int]
_ENGINES: list[Any] = []
"""What holds the code in memory, for as long as the process runs."""
THERE = {"memcpy", "memmove", "memset", "exp", "log"}
"""What machine code may call: functions of the C library."""
POINTERS = Path(__file__).with_name("pointers.py")
INTO = 2
"""Arguments that numba puts before ours: where the result goes, and what went wrong."""


def function(about: str, sources: Sequence[Path], make: Callable[[], str]) -> Compiled | None:
    """What was kept about a function that is written in these files, or what `make` compiles, loaded; None where there
    is no compiler for it."""
    if remembered.home() is None:
        return None
    try:
        about = f"{about} {_compiler(tuple(sources))}"
        check, _, kept = (remembered.recall("kernels", about) or "").partition("\n")
        if check != _check(kept):
            kept = make()
            remembered.keep("kernels", about, f"{_check(kept)}\n{kept}")
        return _load(kept)
    except Exception:  # noqa: BLE001 - whatever a compiler of another version says, the plain way is there
        return None


def _check(kept: str) -> str:
    return hashlib.sha256(kept.encode()).hexdigest()


@cache
def _compiler(sources: tuple[Path, ...]) -> str:
    """What machine code depends on beside its name."""
    from llvmlite import binding

    text = b"".join(source.read_bytes() for source in (*sources, POINTERS))
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    features = binding.get_host_cpu_features().flatten()
    return " ".join([hashlib.sha256(text).hexdigest(), *versions, binding.get_host_cpu_name(), features])


def compiled(name: str, function: Callable[..., Any], arguments: Sequence[Any]) -> str:
    """A line with the function's name and the types of its arguments, a line with its machine code; it gives an int64.

    Raises ValueError for a function that calls what only its compiler has.
    """
    from llvmlite import binding
    from numba import cfunc, types

    compiled: Any = cfunc(types.int64(*arguments), error_model="numpy")(function)
    module = binding.parse_assembly(compiled.inspect_llvm())
    symbol = compiled.native_name.removeprefix("cfunc.")
    # numba's wrapper for callers of C needs the interpreter; the function in it does not
    for one in module.functions:
        if one.name != symbol and not one.is_declaration:
            one.linkage = "internal"
    passes = binding.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    machine = _machine()
    passes.run(module, binding.create_pass_builder(machine, binding.create_pipeline_tuning_options()))
    if missing := {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")} - THERE:
        raise ValueError(f"{name} needs {', '.join(missing)}, which only its compiler has")
    kinds = " ".join(_letter(kind) for kind in arguments)
    return f"{symbol} {kinds}\n{base64.b64encode(machine.emit_object(module)).decode()}"


def _letter(kind: Any) -> str:
    return "p" if "CPointer" in type(kind).__name__ else {"int64": "i", "uint32": "u", "float32": "f"}[str(kind)]


def _machine() -> Any:
    from llvmlite import binding

    with suppress(RuntimeError):
        # versions that do it by themselves refuse
        binding.initialize()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    features = binding.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)


def _load(kept: str) -> Compiled:
    from llvmlite import binding

    head, _, code = kept.partition("\n")
    symbol, *kinds = head.split(" ")
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(base64.b64decode(code, validate=True)))
    engine.finalize_object()
    _ENGINES.append(engine)
    letters = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "u": ctypes.c_uint32, "f": ctypes.c_float}
    types = [ctypes.c_void_p] * INTO + [letters[kind] for kind in kinds]
    found = ctypes.CFUNCTYPE(ctypes.c_int32, *types)(engine.get_function_address(symbol))

    def call(*arguments: Any) -> int:
        result, wrong = ctypes.c_int64(), ctypes.c_void_p()
        status = found(ctypes.addressof(result), ctypes.addressof(wrong), *arguments)
        return result.value if status == 0 else 1

    return call
