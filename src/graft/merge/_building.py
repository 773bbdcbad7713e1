"""The process that says what a configuration builds, without most of what `transformers` imports along with a model.

Names and shapes need no compiler, no distributed tensors and none of the packages that other parts of it work with.
What cannot be built without them is built with everything (see `Check`).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from graft.merge.architecture import Empty, described

NOT_NEEDED = ("scipy", "sklearn", "accelerate", "pandas", "PIL", "torchvision")
"""Packages that stand for not installed."""
COMPILER = "torch._dynamo"
"""Package in whose place stands one of which everything is a decorator that changes nothing."""


def unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """The function itself, as `@decorator` and as `@decorator(…)`."""
    return function if callable(function) else unchanged


class _Decorators(ModuleType):
    __path__: MutableSequence[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return unchanged


class _Without(MetaPathFinder, Loader):
    """Finds the compiler, and all modules in it, as decorators that change nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        inside = name == COMPILER or name.startswith(f"{COMPILER}.")
        return ModuleSpec(name, self, is_package=True) if inside else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Decorators(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: there is nothing in it."""


def lighten() -> Empty:
    """Leave out of this process what names and shapes do not need; what makes models without memory there.

    Tensors of a size have none, those of values (such as positions) do: what is computed of these without memory needs
    most of what was left out.
    """
    # a name that stands for None is not installed, for all that transformers can tell
    sys.modules.update(dict.fromkeys(NOT_NEEDED))  # type: ignore[arg-type]
    sys.meta_path.insert(0, _Without())
    import torch
    from torch.overrides import TorchFunctionMode

    torch.distributed.is_available = lambda: False
    torch.compiler.disable = unchanged  # type: ignore[assignment]
    for name, function in vars(torch.nn.init).items():
        if name.endswith("_") and callable(function):
            setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    sized = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    class Sized(TorchFunctionMode):
        def __torch_function__(
            self,
            function: Callable[..., Any],
            types: Any,
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            named = dict(kwargs or {})
            if function in sized and named.get("device") is None:
                named["device"] = "meta"
            return function(*args, **named)

    return Sized


def main() -> None:
    """Print what the configuration on stdin builds."""
    with tempfile.TemporaryDirectory() as place:
        Path(place, "config.json").write_text(sys.stdin.read())
        print(described(Path(place), lighten()))
