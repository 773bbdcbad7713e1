"""Adapters: few trained weights on a frozen model, all of them points of one design space.

`point.py` says what a point is, `places.py` where in a model it goes, `forms.py` what it computes, `stack.py` how
adapters sit in a model (switched, stacked, averaged, each row its own), `folder.py` how they lie on disk.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.adapters.folding import fold
    from graft.adapters.foreign import tasks_of
    from graft.adapters.point import Point
    from graft.adapters.stack import Adapters, adapters_of, adopt

_WHERE = {"Point": "point", "Adapters": "stack", "adapters_of": "stack", "adopt": "stack", "fold": "folding",
          "tasks_of": "foreign"}  # fmt: skip

__all__ = ["Adapters", "Point", "adapters_of", "adopt", "fold", "tasks_of"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"graft.adapters.{_WHERE[name]}"), name)
