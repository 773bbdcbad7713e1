"""The state to resume from: one file a state, whole or not there, checked when read.

`state-<step>.safetensors` holds tensors by name; its metadata holds the facts (JSON), the CRC-32 of every tensor and
the CRC-32 of both. It is written beside, synced and renamed; the newest two stay, so that there is one to go back to.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from graft.disk import disk_errors, sync

Facts = dict[str, Any]

WRITTEN_A_SECOND = 4e8
"""Guess: bytes of a state that are written in a second, for the time before the first one shows."""


def pause(cost: float) -> float:
    """Seconds between two states when writing one takes `cost` seconds: what a kill loses at most.

    Writing takes under half a percent of the time; where that would be less often than every ten minutes, under 2 %.
    """
    return max(20.0, min(200 * cost, max(600.0, 50 * cost)))


@dataclass(frozen=True)
class State:
    """What a training needs to go on: tensors by name, and facts (plain JSON values)."""

    tensors: dict[str, torch.Tensor]
    facts: Facts


def write_state(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Facts) -> None:
    """Write the state after `step` steps; the newest two stay. Raises DiskError, with what was there still there."""
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    body = json.dumps({"facts": facts, "crc": {name: _crc(tensor) for name, tensor in held.items()}})
    temporary = folder / "state.partial"
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(held, temporary, metadata={"body": body, "crc": str(zlib.crc32(body.encode()))})
            sync(temporary)
            os.replace(temporary, folder / f"state-{step:09d}.safetensors")
            sync(folder)
            for old in _files(folder)[2:]:
                old.unlink()
        except (OSError, SafetensorError):
            temporary.unlink(missing_ok=True)
            raise


def read_state(folder: Path) -> State | None:
    """The newest state in `folder` that is whole; None where there is none."""
    for file in _files(folder):
        state = _read(file)
        if state is not None:
            return state
    return None


def forget_states(folder: Path) -> None:
    """Remove every state in `folder`: those of another training would stand before the ones to come."""
    with disk_errors(folder):
        for file in _files(folder):
            file.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.safetensors"), reverse=True)


def _read(file: Path) -> State | None:
    try:
        with safe_open(file, framework="pt") as opened:
            written = opened.metadata() or {}
            body = written.get("body", "")
            if written.get("crc") != str(zlib.crc32(body.encode())):
                return None
            found = json.loads(body)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    whole = {name: _crc(tensor) for name, tensor in tensors.items()} == found["crc"]
    return State(tensors, found["facts"]) if whole else None


def _crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
