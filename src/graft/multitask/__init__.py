"""One body, a head for each task: models of `transformers` that share their modules, and folders that share weights.

`build.py` puts heads of the classes of `transformers` on a model's body; `folder.py` writes and finds them: each is a
folder of its own that `transformers` loads, whose weights below the head are those of the model's folder.
"""

from __future__ import annotations

from graft.multitask.folder import HEADS, HeadFacts, heads_in

__all__ = ["HEADS", "HeadFacts", "heads_in"]
