"""The random state of a process: torch (CPU and accelerator), numpy, Python."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed all generators; different in each process if `seed` is."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of all generators, as plain JSON values."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    module = torch.get_device_module(device)
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "device": None if device.type == "cpu" else module.get_rng_state(device).numpy().tobytes().hex(),
        "numpy": [str(kind), np.asarray(keys).tolist(), int(place), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put all generators where `random_state` found them."""
    torch.set_rng_state(_bytes(state["torch"]))
    if state["device"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(_bytes(state["device"]), device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
