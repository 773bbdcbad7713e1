"""Learning rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from graft.train.settings import TrainSettings


def rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Learning rate of step `step` (0 … steps - 1).

    The first w (warmup) steps rise linearly: (step + 1) / w of the peak. Behind them the rate goes from the peak
    towards `final_rate` of it, which it would reach at step `steps`: no step is spent on a rate of zero.
    """
    warmup = share_or_count(settings.warmup, steps, below=1.0)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    low = settings.final_rate
    match settings.schedule:
        case "linear":
            factor = 1 - (1 - low) * done
        case "cosine":
            factor = low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
        case "wsd":
            decay = max(1, share_or_count(settings.decay, steps, below=1.0 + 1e-9))
            factor = 1 - (1 - low) * max(0.0, (step - (steps - decay)) / decay)
        case "constant":
            factor = 1.0
    return settings.learning_rate * factor


def share_or_count(value: float, steps: int, below: float) -> int:
    """Steps meant by `value`: a share of `steps` where it is under `below`, else a count; never more than `steps`."""
    return min(steps, round(value * steps if value < below else value))
