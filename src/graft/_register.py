"""Makes the Auto classes of `transformers` know ensembles, without importing it before somebody else does."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

AFTER = "transformers.models.auto.modeling_auto"
"""The module behind the Auto classes: ensembles are registered right after it has been imported."""


def register_when_imported() -> None:
    """Register at once where `transformers` is loaded already, else as soon as its Auto classes are."""
    if AFTER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Unless a room of ensembles is being imported itself: it registers its class at its end."""
    rooms = [module for name, module in sys.modules.items() if name.startswith("graft.ensemble.")]
    if not any(getattr(module.__spec__, "_initializing", False) for module in rooms):
        import graft.adapters.auto
        import graft.ensemble.model  # noqa: F401


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the others find AFTER and puts the registration behind its loading."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != AFTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that registers ensembles when the module has been executed."""

    def __init__(self, inner: importlib.abc.Loader):
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()
