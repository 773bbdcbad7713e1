"""How far a training is."""

from __future__ import annotations

from dataclasses import dataclass, field

from graft.train.settings import EarlyStopping


@dataclass
class Position:
    """How far a training is; with tensors and random state, all there is to it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    dev: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    def compare(self, score: float, stopping: EarlyStopping | None) -> None:
        """Note a dev loss: the best so far, or one more without a better one."""
        margin = stopping.min_delta if stopping else 0.0
        if self.best is None or score < self.best - margin:
            self.best, self.best_step, self.waited = score, self.step, 0
        else:
            self.waited += 1
