"""What a training looks at now and then: losses that were left on the device, read together, checked and logged."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from graft.errors import TrainingError
from graft.train.journal import Journal
from graft.train.place import Place
from graft.train.position import Position
from graft.train.settings import TrainSettings

LOOK_S = 0.5
"""Losses are read from the device, checked and logged this often."""


@dataclass(frozen=True)
class Pending:
    """A step whose loss has not been read from the device yet."""

    step: int
    loss: torch.Tensor
    norm: torch.Tensor
    weight: float
    tokens: int
    learning_rate: float
    seconds: float


class Looks:
    """The steps of a training (at `at`, of `steps`) whose losses have not been read, and the reading of them.

    `scaled`: losses are scaled, so that a gradient which is not finite is no fault.
    """

    def __init__(self, place: Place, journal: Journal, at: Position, steps: int, settings: TrainSettings, scaled: bool):
        self.place, self.journal, self.at, self.steps, self.settings = place, journal, at, steps, settings
        self.scaled = scaled
        self.pending: list[Pending] = []
        self.looked, self.logged_tokens = time.monotonic(), at.tokens

    def due(self) -> bool:
        """Whether the last look was long enough ago."""
        return time.monotonic() - self.looked >= LOOK_S

    def rest(self) -> None:
        """What was done since the last look does not count as training."""
        self.looked = time.monotonic()

    def look(self) -> None:
        """Read the losses of the steps since the last look, check and log them. The one place that waits."""
        if not self.pending:
            return
        losses = self.place.total(torch.stack([p.loss for p in self.pending]).tolist())
        norms = torch.stack([p.norm for p in self.pending]).tolist()
        now = time.monotonic()
        rate_ = (self.at.tokens - self.logged_tokens) / max(now - self.looked, 1e-9)
        for entry, loss, norm in zip(self.pending, losses, norms, strict=True):
            self._log(entry, loss / entry.weight, norm, rate_)
        self.journal.show(
            self.at.step, f"step {self.at.step}/{self.steps} · loss {self.at.loss:.3f} · {rate_:,.0f} tokens/s"
        )
        self.pending.clear()
        self.looked, self.logged_tokens = now, self.at.tokens

    def _log(self, entry: Pending, loss: float, norm: float, tokens_per_s: float) -> None:
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaled):
            raise TrainingError(
                f"step {entry.step}: expected a finite loss and gradient, found loss {loss:g}, gradient norm {norm:g}; "
                f"look at the learning rate ({entry.learning_rate:g}), the precision ({self.settings.precision}), the "
                f"weights it started from and rows {(entry.step - 1) * self.settings.batch_size} to "
                f"{entry.step * self.settings.batch_size - 1}; the state before it is kept"
            )
        self.at.loss = loss
        self.journal.write(
            {
                "step": entry.step,
                "loss": loss,
                "tokens": entry.tokens,
                "tokens_per_s": tokens_per_s,
                "learning_rate": entry.learning_rate,
                "grad_norm": norm if math.isfinite(norm) else None,
                "seconds": entry.seconds,
            }
        )
