"""Makes the Auto classes of `transformers` know ensembles, without importing it before somebody else does."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

AUTO = "transformers.models.auto"
"""The package of the Auto classes: what they are to know is registered right after its modules have been imported."""


def register_when_imported() -> None:
    """Register at once where modules of the Auto classes are loaded already, else as soon as they are."""
    waiting = {name for name in AFTER if name not in sys.modules}
    for name in AFTER.keys() - waiting:
        AFTER[name]()
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))


def _configurations() -> None:
    """What reads a `config.json`: without the models, since tokenizers' Auto classes need it too."""
    import graft.adapters.configuration

    if not _being_imported():
        import graft.ensemble.byte_level.configuration
        import graft.ensemble.configuration  # noqa: F401


def _models() -> None:
    if not _being_imported():
        import graft.adapters.auto
        import graft.ensemble.model  # noqa: F401


def _being_imported() -> bool:
    """Whether a room of ensembles is being imported itself: it registers its class at its end."""
    rooms = [module for name, module in sys.modules.items() if name.startswith("graft.ensemble.")]
    return any(getattr(module.__spec__, "_initializing", False) for module in rooms)


AFTER = {f"{AUTO}.configuration_auto": _configurations, f"{AUTO}.modeling_auto": _models}
"""What is done after a module has been imported."""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the others find the modules `waiting` and puts what is registered behind their
    loading."""

    def __init__(self, waiting: set[str]):
        self.waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.waiting:
            return None
        self.waiting.discard(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, AFTER[name])
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that does something `after` the module has been executed."""

    def __init__(self, inner: importlib.abc.Loader, after: Callable[[], None]):
        self.inner, self.after = inner, after

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        self.after()
