"""What training will cost, from sizes alone. Light."""

from __future__ import annotations

from graft.train.memory import CONVENTIONS, PROCESS, Dimensions, activation_bytes, model_states
from graft.train.settings import TrainSettings
from graft.verb import Estimate

CPU_FLOPS = 60e9
"""Guess: floating-point operations a second that training small models reaches on a few CPU cores."""


def training_estimate(
    parameters: int, settings: TrainSettings, length: int, known: Dimensions | None = None, trained: int | None = None
) -> Estimate:
    """Disk, memory (the process, weights, gradients, two moments, activations) and time on a CPU.

    `known` None: activations by rule of thumb. `trained` None: all parameters are. A token costs 6 floating-point
    operations a parameter (Kaplan et al. 2020, section 2.1). Budgets in epochs have no estimate of time, since that
    takes reading the data.
    """
    step_tokens = settings.batch_size * length
    amount, unit = settings.budget.amount, settings.budget.unit
    tokens = {"tokens": amount, "steps": amount * step_tokens, "epochs": None}[unit]
    states = model_states(parameters, CONVENTIONS["fp32"], trained=trained, frozen_bytes=4)
    average = 4 * (parameters if trained is None else trained) if settings.ema else 0
    activations = _activations(parameters, settings, step_tokens / settings.accumulate, known)
    # gradients come as activations go; those of the pieces before stand beside the activations of the next
    passing = max(states.gradients, activations) if settings.accumulate == 1 else states.gradients + activations
    memory = PROCESS + states.weights + states.optimizer + average + passing
    seconds = None if tokens is None else 6 * parameters * tokens / CPU_FLOPS
    note = "time for a CPU at 60 GFLOP/s" + ("" if known else "; activations by rule of thumb")
    return Estimate(parameters, 4 * parameters, int(memory), seconds, note)


def _activations(parameters: int, settings: TrainSettings, tokens: float, known: Dimensions | None) -> float:
    """Of one piece of a step. Half precision keeps casts of the weights beside."""
    half = settings.precision != "fp32"
    casts = 2 * parameters if half else 0
    if known is not None:
        return casts + activation_bytes(known, tokens, half=half, checkpointing=settings.gradient_checkpointing)
    # about 16 channels-wide activations a layer are kept for backward; parameters ≈ 12 · layers · width², so that
    # layers · width ≈ parameters / (12 · width): with widths of 256 this is near parameters / 3,000 a token
    return casts + 4 * 16 * (parameters / 3000) * tokens
