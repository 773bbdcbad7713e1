"""Dropout at test time: passes of one model, each with masks of its own, as members that share its weights.

A pass draws one mask for each dropout layer, over channels, and keeps it at every token and in every row (variational
dropout, Gal and Ghahramani 2016). A pass is therefore a model like others: with a cache it says what it says without,
in a batch what it says alone, and the same seed gives the same pass.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graft.errors import RequestError

M = TypeVar("M", bound=nn.Module)


class FixedDropout(nn.Module):
    """Zeroes a share of the channels, always the same, and scales the rest up by 1 / (1 - share)."""

    def __init__(self, share: float, seed: int, name: str):
        super().__init__()
        self.share, self.seed, self.name = share, seed, name
        self._masks: dict[int, torch.Tensor] = {}

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values [batch, length, channels]`; attention probabilities, which have no channels, stay as they are."""
        return values if values.dim() > 3 else values * self.mask(values.shape[-1]).to(values)

    def mask(self, channels: int) -> torch.Tensor:
        """`[channels] float32`, from the seed, the layer's name and the number of channels alone."""
        if channels not in self._masks:
            digest = hashlib.sha256(f"{self.seed} {self.name} {channels}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            kept = torch.rand(channels, generator=generator) >= self.share
            self._masks[channels] = kept / (1 - self.share)
        return self._masks[channels]


def twin(model: M) -> M:
    """A model of its own modules and the very same weights: they are in memory once."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def thinned(model: M, share: float | None, seed: int) -> M:
    """A twin of `model` with one pass's masks. `share` None: at its own dropout layers, with their own shares.

    With a `share`, masks stand before every linear layer but the one that gives the logits (dropout injection,
    Ledda et al. 2023), whatever the model was trained with. Raises RequestError where there is nothing to mask.
    """
    found = twin(model)
    count = _replace_own(found, seed) if share is None else _before_linear(found, share, seed)
    if not count:
        raise RequestError(
            f"{type(model).__name__} has no dropout layer with a share above zero: say the share, such as "
            "`dropout: {share: 0.1}`"
        )
    found.graft_dropout = {"share": share, "seed": seed}  # type: ignore[assignment]
    return found.eval()


def _replace_own(model: nn.Module, seed: int) -> int:
    own = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Dropout) and layer.p > 0]
    for name, layer in own:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, FixedDropout(layer.p, seed, name))
    return len(own)


def _before_linear(model: nn.Module, share: float, seed: int) -> int:
    count = 0
    for name, layer in _linear(model):
        layer.register_forward_pre_hook(_masking(FixedDropout(share, seed, name)))
        count += 1
    return count


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    heads = [part.get_output_embeddings() for part in model.modules() if isinstance(part, PreTrainedModel)]
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and not any(layer is head for head in heads):
            yield name, layer


def _masking(dropout: FixedDropout) -> Any:
    return lambda _layer, inputs: (dropout(inputs[0]), *inputs[1:])
