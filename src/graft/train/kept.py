"""Checkpoints on the way: the last k and the best k, complete folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from graft.disk import atomic_folder
from graft.train.settings import Keep

Scores = dict[int, float | None]


def chosen(scores: Scores, keep: Keep) -> Scores:
    """Those of `scores` (dev loss or None by step) that stay: `last` newest and `best` lowest, the older of equals."""
    last = sorted(scores)[-keep.last :] if keep.last else []
    scored = sorted((score, step) for step, score in scores.items() if score is not None)
    best = [step for _, step in scored[: keep.best]]
    return {step: scores[step] for step in sorted({*last, *best})}


class Kept:
    """The folders `step-N` in `folder`. `scores` (part of the state) says which there are."""

    def __init__(self, folder: Path, keep: Keep, scores: Scores, step: int):
        self.folder, self.keep, self.scores = folder, keep, dict(scores)
        for made in folder.glob("*") if folder.exists() else ():
            if _unfinished(made) or _step(made) > step:
                shutil.rmtree(made)

    def add(self, step: int, score: float | None, save: Callable[[Path], None]) -> None:
        """Save the checkpoint of `step` unless it would not stay, and remove those that no longer do."""
        stay = chosen({**self.scores, step: score}, self.keep)
        if step in stay:
            with atomic_folder(self.folder / f"step-{step}") as part:
                save(part)
        for old in set(self.scores) - set(stay):
            shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)
        self.scores = stay


def _unfinished(folder: Path) -> bool:
    return folder.name.startswith(".")


def _step(folder: Path) -> int:
    kind, _, number = folder.name.partition("-")
    return int(number) if kind == "step" and number.isdigit() else -1
