"""The verbs of a recipe. Other packages add theirs: an entry point in the group `graft.verbs` names a `Verb`."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from graft.errors import UnknownName
from graft.methods import entry_points
from graft.verb import Verb

if TYPE_CHECKING:
    from graft.lineage import Manifest

_OWN = {
    "load": "graft._load",
    "pretrain": "graft.pretrain",
    "tune": "graft.tune",
    "adapt": "graft.adapt",
    "head": "graft.head",
    "merge": "graft.merge",
    "ensemble": "graft.ensemble",
    "quantize": "graft.quantize",
}
"""Where each of graft's own verbs has its `VERB`, in the order in which a family grows."""


def verb_names() -> list[str]:
    """All verbs, graft's own first."""
    return list(dict.fromkeys([*_OWN, *sorted(e.name for e in _entries())]))


def verb(name: str) -> Verb[Any]:
    """The verb of that name. Raises UnknownName, listing all."""
    if name in _OWN:
        return importlib.import_module(_OWN[name]).VERB
    for entry in _entries():
        if entry.name == name:
            return entry.load()
    raise UnknownName("verb", name, verb_names())


def told(manifest: Manifest) -> list[str]:
    """What people should read of how a model came about, a line each."""
    beside = {"forced": manifest.forced} if manifest.forced else {}
    return verb(manifest.verb).told({**manifest.notes, **beside, "metrics": manifest.metrics})


def _entries() -> importlib.metadata.EntryPoints:
    return entry_points("graft.verbs")
