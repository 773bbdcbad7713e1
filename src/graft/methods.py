"""A method is one file: its name in a recipe is its module's name in the folder of its verb.

Other packages add methods through an entry point in the group `graft.<folder>` (for example `graft.merge`) that names
a module of the same shape.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
from functools import lru_cache
from types import ModuleType

from graft.errors import UnknownName


def entry_points(group: str) -> importlib.metadata.EntryPoints:
    """What other packages that are installed add to a group."""
    return _entry_points(group, tuple(sys.path))


@lru_cache(maxsize=64)
def _entry_points(group: str, places: tuple[str, ...]) -> importlib.metadata.EntryPoints:
    # all packages are read through: once for the places they stand in
    return importlib.metadata.entry_points(group=group)


def method_names(package: str) -> list[str]:
    """The methods in `package` (for example `graft.merge`): modules that declare a method, helpers left out.

    A helper module starts with `_` or stands in the package's `ROOMS`.
    """
    parent = importlib.import_module(package)
    rooms = set(getattr(parent, "ROOMS", ()))
    own = [m.name for m in pkgutil.iter_modules(parent.__path__) if not m.name.startswith("_") and m.name not in rooms]
    return sorted({*own, *(e.name for e in entry_points(package))})


def method(package: str, name: str) -> ModuleType:
    """The module of method `name` in `package`. Raises UnknownName, listing the folder."""
    names = method_names(package)
    if name not in names:
        raise UnknownName(f"{package.rpartition('.')[2]} method", name, names)
    return _module(package, name, entry_points(package))


def methods(package: str) -> dict[str, ModuleType]:
    """All methods in `package` by name."""
    entries = entry_points(package)
    return {name: _module(package, name, entries) for name in method_names(package)}


def _module(package: str, name: str, entries: importlib.metadata.EntryPoints) -> ModuleType:
    for entry in entries:
        if entry.name == name:
            return entry.load()
    return importlib.import_module(f"{package}.{name}")
