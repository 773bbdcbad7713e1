"""Linear layers whose weights are packed in 8 or 4 bits (bitsandbytes): what they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_packed(module: nn.Module) -> bool:
    """Whether a module holds its weight in 8 or 4 bits."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dtype in (torch.uint8, torch.int8)


def plain_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as it computes with it; of a packed one `[outputs, inputs]` in its own dtype."""
    weight: Any = module.weight
    if not is_packed(module):
        return weight
    if weight.dtype == torch.uint8:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    from bitsandbytes.functional import int8_vectorwise_dequant

    state: Any = module.state
    codes = state.CB if state.CB is not None else weight.CB
    scales = state.SCB if state.SCB is not None else weight.SCB
    return int8_vectorwise_dequant(codes, scales)
