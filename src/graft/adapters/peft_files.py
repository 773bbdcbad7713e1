"""The two files of a peft folder, read without peft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from graft.checkpoint import read_file_headers
from graft.errors import CheckpointError, RequestError
from graft.finite import check_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Weights = Mapping[str, torch.Tensor]


def read_settings(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says. Raises RequestError without one, CheckpointError for a damaged one."""
    path = folder / CONFIG
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RequestError(f"{folder}: expected a peft folder with {CONFIG}, found none") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, found a damaged file ({error})") from None


def read_weights(folder: Path) -> Weights:
    """The adapter's tensors, by peft's names. Raises CheckpointError where they are missing or damaged."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        read = f"; {pickle.name} is a pickle, which merges alone read (`allow_pickle`, --allow-pickle)"
        hint = read if pickle.exists() else ""
        raise CheckpointError(f"{folder}: expected {WEIGHTS}, found no such file{hint}")
    read_file_headers(path)
    found = load_file(path)
    check_tensors(found, path)
    return found
