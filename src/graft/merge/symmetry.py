"""What of a transformer may be put into another order without changing what it computes.

Three kinds of units have no order of their own: the channels of the residual stream (one order for the whole model),
the hidden units of each feed-forward block, and the heads of each attention block, with the value channels inside a
head. Which axis of which tensor counts which units is read from the types and names of the modules. What cannot be read
is an error: an order that reaches only some of the tensors would destroy the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graft.checkpoint import FLOATS, Headers
from graft.errors import CannotCombine
from graft.merge.architecture import empty_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

RESIDUAL = "residual"
Axis = tuple[str, ...]
"""The units that stand along an axis, one kind behind the other (fused projections); none: an order of its own."""

ROLES = {
    "q": ("q_proj", "query", "q_lin"),
    "k": ("k_proj", "key", "k_lin"),
    "v": ("v_proj", "value", "v_lin"),
    "o": ("o_proj", "out_proj", "out_lin", "attention.output.dense", "attn.c_proj", "self_attn.dense"),
    "qkv": ("c_attn", "qkv_proj"),
    "in": ("gate_proj", "up_proj", "fc1", "c_fc", "fc_in", "lin1", "intermediate.dense"),
    "gate+up": ("gate_up_proj",),
    "out": ("down_proj", "fc2", "fc_out", "lin2", "mlp.c_proj", "output.dense"),
}
"""Linear layers by the ends of their names. The first that fits counts."""
HEADS = ("cls.", "lm_head.", "head.")
"""What stands behind the last layer keeps the order of the residual stream, which tied embeddings ask for."""


@dataclass(frozen=True)
class Heads:
    """`groups` of `each` query heads share one key and value head; a head has `size` channels."""

    groups: int
    each: int
    size: int


@dataclass(frozen=True)
class Symmetries:
    """For every tensor the units along each axis; how many units there are of each kind; the layers, in order."""

    axes: Mapping[str, tuple[Axis, ...]]
    sizes: Mapping[str, int]
    layers: tuple[str, ...]
    heads: Heads


def symmetries(folder: Path) -> Symmetries:
    """Of the model in `folder`, from its configuration alone. Raises CannotCombine, naming what cannot be read."""
    model = empty_model(folder)
    if model is None or model.config.is_encoder_decoder:
        kind = "an encoder–decoder" if model is not None else "an architecture that transformers does not know"
        raise CannotCombine(f"{folder}: expected a decoder or an encoder whose order can be read, found {kind}")
    if not hasattr(model.config, "num_attention_heads"):
        raise CannotCombine(
            f"{type(model).__name__}: expected a model of attention and feed-forward blocks, found one without heads: "
            "what may change places there is not known"
        )
    heads = _heads(model.config)
    axes: dict[str, tuple[Axis, ...]] = {}
    unread = []
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            found = _axes(model, name, module, own, tuple(parameter.shape), heads)
            full = f"{name}.{own}" if name else own
            if found is None:
                unread.append(full)
            else:
                axes[full] = found
    if unread:
        more = " and more" if len(unread) > 4 else ""
        raise CannotCombine(
            f"{type(model).__name__}: expected attention and feed-forward blocks with known names, found "
            f"{', '.join(unread[:4])}{more}: what may change places there is not known"
        )
    layers = dict.fromkeys(label.rpartition(":")[0] for found in axes.values() for axis in found for label in axis)
    return Symmetries(axes, _sizes(model, axes), tuple(layer for layer in layers if layer), heads)


def check_read(known: Symmetries, headers: Headers, folder: Path) -> None:
    """Raises CannotCombine where a model stores weights that its configuration does not speak of."""
    strange = [name for name, header in headers.items() if name not in known.axes and header.dtype in FLOATS]
    if strange:
        raise CannotCombine(
            f"{folder}: expected the weights that its configuration names, found {', '.join(strange[:4])} as well"
        )


def _heads(config: PretrainedConfig) -> Heads:
    count = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or count)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // count)
    return Heads(groups, count // groups, size)


def _axes(
    model: PreTrainedModel, name: str, module: nn.Module, own: str, shape: tuple[int, ...], heads: Heads
) -> tuple[Axis, ...] | None:
    """The units along each axis of one parameter; None where that cannot be read."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    width = int(model.config.hidden_size)
    if isinstance(module, nn.Embedding):
        return ((), (RESIDUAL,)) if shape[1] == width else None
    if isinstance(module, nn.Linear | Conv1D):
        ends = _ends(model, name, module)
        if ends is None:
            return None
        into, out = ends
        if own == "bias":
            return (out,)
        return (into, out) if isinstance(module, Conv1D) else (out, into)
    return _of_vector(name, own, shape, width, heads)


def _of_vector(name: str, own: str, shape: tuple[int, ...], width: int, heads: Heads) -> tuple[Axis, ...] | None:
    """Norms, and biases that stand outside of a linear layer."""
    if len(shape) != 1:
        return None
    layer, last = _layer(name), name.rpartition(".")[2]
    if last in ("q_norm", "k_norm"):
        # one norm for all heads alike, or one over all heads together
        return ((),) if shape[0] == heads.size else ((f"{layer}:{last[0]}",),)
    if f"{name}.".startswith(HEADS) and own == "bias" and not last.lower().endswith("norm"):
        return ((),)
    return ((RESIDUAL,),) if shape[0] == width else None


def _ends(model: PreTrainedModel, name: str, module: nn.Module) -> tuple[Axis, Axis] | None:
    """(units that a linear layer reads, units that it writes)."""
    residual: Axis = (RESIDUAL,)
    if module is model.get_output_embeddings():
        return (residual, ())
    if name.startswith(HEADS) and name.endswith(".dense"):
        return (residual, residual)
    role = next((role for role, ends in ROLES.items() if any(f".{name}".endswith(f".{end}") for end in ends)), None)
    layer = _layer(name)
    if role is None or layer is None:
        return None
    hidden, queries, keys, values, heads = (f"{layer}:{unit}" for unit in ("mlp", "q", "k", "v", "o"))
    return {
        "q": (residual, (queries,)),
        "k": (residual, (keys,)),
        "v": (residual, (values,)),
        "qkv": (residual, (queries, keys, values)),
        "o": ((heads,), residual),
        "in": (residual, (hidden,)),
        "gate+up": (residual, (hidden, hidden)),
        "out": ((hidden,), residual),
    }[role]


def _layer(name: str) -> str | None:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else None


def _sizes(model: PreTrainedModel, axes: Mapping[str, tuple[Axis, ...]]) -> dict[str, int]:
    """How many units there are of each kind that stands alone along some axis."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    along = ((axis, size) for name, found in axes.items() for axis, size in zip(found, shapes[name], strict=True))
    return {axis[0]: size for axis, size in along if len(axis) == 1}
