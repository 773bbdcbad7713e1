"""What training will cost, from sizes alone. Light."""

from __future__ import annotations

from graft.train.settings import TrainSettings
from graft.verb import Estimate

PROCESS = 300 * 2**20
"""Bytes that a process with torch and transformers holds before it holds a model."""
CPU_FLOPS = 60e9
"""Guess: floating-point operations a second that training small models reaches on a few CPU cores."""


def training_estimate(parameters: int, settings: TrainSettings, length: int) -> Estimate:
    """Disk, memory (process, weights, gradients and two moments in fp32, activations by rule of thumb), time on a CPU.

    A token costs 6 floating-point operations a parameter (Kaplan et al. 2020, section 2.1). Budgets in epochs have no
    estimate of time, since that takes reading the data.
    """
    step_tokens = settings.batch_size * length
    amount, unit = settings.budget.amount, settings.budget.unit
    tokens = {"tokens": amount, "steps": amount * step_tokens, "epochs": None}[unit]
    weights = 4 * parameters
    copies = 5 if settings.ema else 4
    # about 16 channels-wide activations a layer are kept for backward; parameters ≈ 12 · layers · width², so that
    # layers · width ≈ parameters / (12 · width): with widths of 256 this is near parameters / 3,000 a token
    activations = 4 * 16 * (parameters / 3000) * step_tokens / settings.accumulate
    seconds = None if tokens is None else 6 * parameters * tokens / CPU_FLOPS
    note = "time for a CPU at 60 GFLOP/s; activations by rule of thumb"
    return Estimate(parameters, weights, int(PROCESS + weights * copies + activations), seconds, note)
