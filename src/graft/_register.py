"""Makes the Auto classes of `transformers` know ensembles and adapters, without importing it first."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO = "transformers.models.auto"
"""The package of the Auto classes: what they are to know is registered right after its modules have been imported."""
ROOMS = "graft.ensemble."
"""How modules begin that register their own class at their end and may import the Auto classes before."""


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
    import graft.ensemble.byte_level.configuration
    import graft.ensemble.configuration  # noqa: F401


def _models() -> None:
    import graft.adapters.auto
    import graft.ensemble.model  # noqa: F401


AFTER = {f"{AUTO}.configuration_auto": _configurations, f"{AUTO}.modeling_auto": _models}
"""What is done after a module has been imported."""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the others find the modules `waiting` and puts what is registered behind their
    loading. Where that is part of importing a room, it would find the room half there: then it is `late`, and comes
    when the room is whole."""

    def __init__(self, waiting: set[str]):
        self.waiting = waiting
        self.late: list[Callable[[], None]] = []

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in self.waiting:
            self.waiting.discard(name)
            return _followed(importlib.util.find_spec(name), partial(self._register, AFTER[name]))
        if name.startswith(ROOMS) and (self.waiting or self.late):
            return _followed(importlib.machinery.PathFinder.find_spec(name, path, target), partial(self._ended, name))
        return None

    def _register(self, after: Callable[[], None]) -> None:
        self.late.append(after)
        self._ended(None)

    def _ended(self, name: str | None) -> None:
        """A module is whole: what is late is done, unless other rooms are still being imported."""
        if self.late and not any(room != name for room in _being_imported()):
            late, self.late = self.late, []
            for after in late:
                after()


def _being_imported() -> list[str]:
    """The rooms whose import has begun and not ended."""
    rooms = [(name, module.__spec__) for name, module in list(sys.modules.items()) if name.startswith(ROOMS)]
    return [name for name, spec in rooms if getattr(spec, "_initializing", False)]


def _followed(spec: ModuleSpec | None, after: Callable[[], None]) -> ModuleSpec | None:
    """The same module, with something done `after` it has been executed."""
    if spec is not None and spec.loader is not None:
        spec.loader = _Loader(spec.loader, after)
    return spec


class _Loader(importlib.abc.Loader):
    """A loader that does something `after` the module has been executed."""

    def __init__(self, inner: importlib.abc.Loader, after: Callable[[], None]):
        self.inner, self.after = inner, after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.inner
        self.inner.exec_module(module)
        self.after()
