"""What training will cost, from sizes alone. Light."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from graft.machine import cores
from graft.train.memory import (
    CONVENTIONS,
    OPTIMIZER_BYTES,
    PROCESS,
    Dimensions,
    States,
    activation_bytes,
    model_states,
)
from graft.train.parallel import TOGETHER, Parallel
from graft.train.settings import TrainSettings
from graft.verb import Estimate

CORE_FLOPS = 35e9
"""Guess: floating-point operations a second that training small models in fp32 reaches on a core.

Trainings of small models on 4 cores of an AMD EPYC with AVX2 reached 33e9 to 52e9 a core (the latter is that of
bench/training.py: 10.1M parameters), which could do about 96e9: two fused multiply-adds of 8 numbers in each of 3e9
cycles a second. Wider models and cores with AVX-512 do more, cores that are shared with other work less.
"""


TOKENISED = 3e6
"""Guess: bytes of text that a core reads, hashes and turns into tokens in a second."""
LEARNED = {"bpe": 2e6, "unigram": 4.5e5, "wordpiece": 2.5e6}
"""Guess: bytes of text that a core reads in a second for a new tokenizer, by how its tokens are found."""
BYTES_A_TOKEN = 3.5
"""Guess: bytes of text for a token, where an epoch is to be counted before there are tokens."""


def tokenising(text: Mapping[str, float], vocabulary: str) -> dict[str, float]:
    """Seconds to make token streams of these splits (bytes by name), by what identifies each stream."""
    return {in_tokens(split, vocabulary): size / (TOKENISED * cores()) for split, size in text.items()}


def in_tokens(split: str, vocabulary: str) -> str:
    """What identifies a token stream."""
    return f"{split} in tokens of {vocabulary}"


def learning_tokens(text: float, algorithm: str) -> float:
    """Seconds to train a tokenizer on so many bytes."""
    return text / (LEARNED[algorithm] * cores())


def threads() -> int:
    """Threads that torch will compute with: `OMP_NUM_THREADS` where it is set, else the cores this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return cores()


def cpu_flops() -> float:
    """Guess: floating-point operations a second that training reaches here, CORE_FLOPS for each thread."""
    return CORE_FLOPS * threads()


def on_this_cpu() -> str:
    """What such estimates of time rest on, in words."""
    return f"on a CPU at {cpu_flops() / 1e9:.0f} GFLOP/s"


def training_estimate(
    parameters: int,
    settings: TrainSettings,
    length: int,
    known: Dimensions | None = None,
    trained: int | None = None,
    *,
    frozen_bytes: float = 4.0,
    reads: float | None = None,
) -> Estimate:
    """Disk, memory (the process, weights, gradients, two moments, activations) and time on a CPU.

    `known` None: activations by rule of thumb. `trained` None: all parameters are; else so many beside `parameters`,
    which are frozen and lie in `frozen_bytes` each (under 4: packed, which stay whole on every device); `reads` as in
    `activation_bytes`. A token costs 6 floating-point operations a parameter (Kaplan et al. 2020, section 2.1). Budgets
    in epochs have no estimate of time, since that takes reading the data. Where the settings name several devices, the
    memory is that of one of them.

    `parts` are bytes of each kind at most: the process, weights with copies and averages of them, moments, gradients,
    activations (with casts of weights in half precision), and weights in parts that are whole at a time. Gradients come
    as activations go.
    """
    step_tokens = settings.batch_size * length
    amount, unit = settings.budget.amount, settings.budget.unit
    tokens = {"tokens": amount, "steps": amount * step_tokens, "epochs": None}[unit]
    spread = settings.parallel or Parallel()
    devices = spread.devices or 1
    states = states_of(parameters, settings, trained, frozen_bytes)
    average = 4 * (parameters if trained is None else trained) if settings.ema else 0.0
    if spread.spread == 3:
        average /= devices
    read = step_tokens / settings.accumulate / max(1, devices // spread.tensor)
    activations = _activations(parameters, settings, read, known, reads)
    packed = parameters * frozen_bytes if frozen_bytes < 4 else 0.0
    copied = 4 * (parameters if trained is None else trained) / devices if spread.method == "zero" else 0
    kept, elsewhere = _kept(spread, states, average, packed, copied)
    # gradients come as activations go; those of the pieces before stand beside the activations of the next
    gradients = 0 if spread.offload else states.gradients
    beside = settings.accumulate > 1 or (spread.method == "zero" and spread.spread == 3)
    last = _last_block(parameters, settings, read, known, reads)
    passing = gradients + activations if beside else max(gradients + last, activations)
    passing += _sent(spread) if spread.spread < 3 else 0
    whole = _whole(spread, parameters, known, frozen=trained is not None, packed=packed > 0)
    memory = PROCESS + kept + passing + whole
    seconds = None if tokens is None else 6 * parameters * tokens / cpu_flops()
    notes = [_convention(settings, trained, frozen_bytes), f"time {on_this_cpu()}"]
    notes += [] if known else ["activations by rule of thumb"]
    notes += [f"memory of each of {devices} devices ({spread.method})"] if devices > 1 else []
    notes += [f"and {elsewhere / 1e9:.2f} GB a device in the CPU's memory"] if spread.offload else []
    moments = 0.0 if spread.offload else states.optimizer
    held = {
        "process": PROCESS,
        "weights": kept - moments,
        "moments": moments,
        "gradients": gradients,
        "activations": activations,
        "whole at a time": whole,
    }
    parts = {name: int(size) for name, size in held.items()}
    return Estimate(parameters, 4 * parameters, int(memory), seconds, "; ".join(notes), parts)


def _kept(spread: Parallel, states: States, average: float, packed: float, copied: float) -> tuple[float, float]:
    """Bytes that lie on a device between steps, `packed` weights among them, and in the CPU's memory.

    copied: those of the weights that DeepSpeed's optimizer works on, beside those that the model has.
    """
    if not spread.offload:
        return states.weights + states.optimizer + average + copied, 0
    offloaded = states.gradients + states.optimizer + copied
    if spread.spread < 3:
        return states.weights + average, offloaded
    return packed, offloaded + states.weights - packed + average


def _sent(spread: Parallel) -> float:
    """Bytes of the room in which DeepSpeed puts gradients that it sends."""
    return 4 * TOGETHER if spread.method == "zero" else 0


def _whole(spread: Parallel, parameters: int, known: Dimensions | None, *, frozen: bool, packed: bool) -> float:
    """Bytes of weights in parts that are whole at a time, of their gradients, and of the room these are sent in."""
    if spread.spread < 3:
        return 0
    if spread.method == "zero":
        return 4 * min(parameters, TOGETHER) + _sent(spread)
    return _together(parameters, known, frozen=frozen, packed=packed)


def _together(parameters: int, known: Dimensions | None, *, frozen: bool = False, packed: bool = False) -> float:
    """Bytes of the weights in parts that are whole at a time, and of their gradients.

    What stands outside of the blocks (embeddings and scores) and its gradient, one block and its gradient, and the
    next. `frozen` ones have no gradients; blocks of `packed` ones are whole anyway.
    """
    if known is None:
        return 4 * parameters / 5
    outside = max(parameters - known.layers * known.block, min(parameters, known.vocabulary * known.width))
    if packed:
        return 4 * outside
    block = (parameters - outside) / known.layers
    return 4 * (outside + 2 * block if frozen else 2 * outside + 3 * block)


def states_of(parameters: int, settings: TrainSettings, trained: int | None, frozen_bytes: float = 4.0) -> States:
    """Weights, gradients and moments on a device, as `training_estimate` counts them."""
    convention = replace(CONVENTIONS["fp32"], optimizer=OPTIMIZER_BYTES[settings.optimizer])
    whole = parameters + (trained or 0)
    spread = settings.parallel or Parallel()
    return model_states(
        whole, convention, trained=trained, frozen_bytes=frozen_bytes, stage=spread.spread,
        devices=spread.devices or 1, packed=frozen_bytes < 4,
    )  # fmt: skip


def _convention(settings: TrainSettings, trained: int | None, frozen_bytes: float) -> str:
    """Bytes a parameter in words: weights + gradients + K, what the optimizer holds."""
    kept = OPTIMIZER_BYTES[settings.optimizer]
    frozen = "" if trained is None else f", {frozen_bytes:.2g} a frozen one"
    return f"4+4+K bytes a trained parameter, K = {kept:.2g} ({settings.optimizer}){frozen}"


def _activations(
    parameters: int, settings: TrainSettings, tokens: float, known: Dimensions | None, reads: float | None
) -> float:
    """Of one piece of a step. Half precision keeps casts of the weights beside."""
    half, casts = settings.precision != "fp32", _casts(parameters, settings, known)
    if known is not None:
        kept, whole = settings.gradient_checkpointing, _has_whole_logits(settings)
        return casts + activation_bytes(known, tokens, half=half, checkpointing=kept, reads=reads, whole=whole)
    # about 16 channels-wide activations a layer are kept for backward; parameters ≈ 12 · layers · width², so that
    # layers · width ≈ parameters / (12 · width): with widths of 256 this is near parameters / 3,000 a token
    return casts + 4 * 16 * (parameters / 3000) * tokens


def _casts(parameters: int, settings: TrainSettings, known: Dimensions | None) -> int:
    """Bytes of the weights in half precision."""
    if settings.precision == "fp32":
        return 0
    if settings.parallel is not None and settings.parallel.spread == 3 and settings.gradient_checkpointing:
        return int(_together(parameters, known) / 2)
    return 2 * parameters


def _last_block(
    parameters: int, settings: TrainSettings, tokens: float, known: Dimensions | None, reads: float | None
) -> float:
    """With gradient checkpointing, of the block that backward comes to last, when the gradients of the others are
    there: without it the activations of these would have been more."""
    if known is None or not settings.gradient_checkpointing:
        return 0.0
    one, half = replace(known, layers=1, vocabulary=0), settings.precision != "fp32"
    block = activation_bytes(one, tokens, half=half, checkpointing=True, reads=reads)
    return _casts(parameters, settings, known) + block


def _has_whole_logits(settings: TrainSettings) -> bool:
    """Whether the model that trains is one whose output layer is not for a loss to compute: compiled, or in parts which
    only the layer itself puts together."""
    spread = settings.parallel or Parallel()
    return settings.compile or spread.tensor > 1 or (spread.method == "zero" and spread.spread == 3)
