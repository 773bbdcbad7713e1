"""Folders of adapters in the form of peft: written without peft."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from graft.checkpoint import LORA
from graft.disk import atomic_write, disk_errors
from graft.errors import CheckpointError
from graft.lora import CONFIG, START
from graft.merge._factors import Pair
from graft.merge.stream import finite

TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}


def write_lora(
    out: Path,
    pairs: Mapping[str, Pair],
    whole: Mapping[str, Tensor],
    *,
    base: str,
    dtype: str = "float32",
    embeddings: frozenset[str] = frozenset(),
    turned: bool = False,
    architecture: str = "decoder",
) -> None:
    """Write `adapter_config.json` and the factors. `pairs`: module → factors, of scale 1; `whole`: tensor → its values.

    `embeddings` are modules that look rows up; `turned`: the base stores weights as [in, out]. Raises CheckpointError,
    naming the tensor, for values that `dtype` cannot hold.
    """
    ranks = Counter(pair.rank for pair in pairs.values())
    common = max(ranks, key=lambda rank: (ranks[rank], rank))
    biases = _biases(pairs, whole)
    own = {re.escape(name): pair.rank for name, pair in sorted(pairs.items()) if pair.rank != common}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": TASKS.get(architecture),
        "base_model_name_or_path": base,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": own,
        "alpha_pattern": own,
        "target_modules": sorted(pairs),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole if name not in biases}) or None,
        "fan_in_fan_out": turned,
        "bias": "all" if biases else "none",
        "inference_mode": True,
    }
    tensors = {f"{START}{biases.get(name, name)}": values for name, values in whole.items()}
    for name, pair in pairs.items():
        a, b = ("lora_embedding_A", "lora_embedding_B") if name in embeddings else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{START}{name}.{a}": pair.a, f"{START}{name}.{b}": pair.b}
    cast = {name: values.to(getattr(torch, dtype)).contiguous() for name, values in tensors.items()}
    if wrong := [name for name, values in cast.items() if not finite(values)]:
        raise CheckpointError(f"{wrong[0]}: the adapter has values that {dtype} cannot hold")
    with disk_errors(out):
        save_file(cast, out / LORA, metadata={"format": "pt"})
    atomic_write(out / CONFIG, json.dumps(config, indent=2) + "\n")


def _biases(pairs: Collection[str], whole: Collection[str]) -> dict[str, str]:
    """Of tensors that are held whole, the biases of modules that are not, and what they are called in peft's files."""
    modules = {name: name.removesuffix(".bias") for name in whole if name.endswith(".bias")}
    alone = {name: module for name, module in modules.items() if f"{module}.weight" not in whole}
    return {name: f"{module}.base_layer.bias" if module in pairs else name for name, module in alone.items()}
