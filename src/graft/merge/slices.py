"""Which tensor of which model becomes which tensor of a stack of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graft.errors import CannotCombine

if TYPE_CHECKING:
    from graft.merge.passthrough import Slice

LAYER = re.compile(r"(.*?\b(?:layers|layer|h|blocks?)\.)(\d+)(\..*)")
"""prefix, number of the layer, rest."""
INPUTS = ("embed", "wte", "wpe", "shared")


def stack(names: Mapping[str, Sequence[str]], slices: Sequence[Slice]) -> dict[str, dict[str, str]]:
    """Name in the output → {model: name there}. `names` are the tensors of each model.

    Layers are numbered anew; embeddings come from the model of the first slice, what follows the layers from that of
    the last. Raises CannotCombine for a layer that a model does not have.
    """
    made: dict[str, dict[str, str]] = {}
    for own in (slices[0], slices[-1]):
        first = own is slices[0]
        for name in names[own.model]:
            if not LAYER.fullmatch(name) and (first or not any(word in name for word in INPUTS)):
                made[name] = {own.model: name}
    place = 0
    for part in slices:
        layers = _layers(names[part.model])
        for layer in range(*part.layers):
            if layer not in layers:
                raise CannotCombine(f"{part.model} has layers 0 to {max(layers, default=-1)}: no layer {layer}")
            for prefix, rest in layers[layer]:
                made[f"{prefix}{place}{rest}"] = {part.model: f"{prefix}{layer}{rest}"}
            place += 1
    return made


def _layers(names: Sequence[str]) -> dict[int, list[tuple[str, str]]]:
    found: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            found.setdefault(int(match[2]), []).append((match[1], match[3]))
    return found


def restacked(configs: Mapping[str, Mapping[str, Any]], slices: Sequence[Slice]) -> dict[str, Any]:
    """The configuration of the stack: that of the first slice's model, with as many layers as there are now.

    What it lists for each layer (`layer_types`, for example) follows the layers.
    """
    config = dict(configs[slices[0].model])
    key = next((k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config), None)
    if key is None:
        raise CannotCombine(f"{slices[0].model}: expected a number of layers in its configuration, found none")
    total = sum(part.layers[1] - part.layers[0] for part in slices)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == config[key] and name != "architectures":
            config[name] = [v for part in slices for v in configs[part.model][name][slice(*part.layers)]]
    return config | {key: total}
