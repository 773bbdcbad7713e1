"""Layers: which tensors belong to which, how deep a tensor lies, and what a stack of slices of layers is made from."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from graft.errors import CannotCombine

Slice = Mapping[str, tuple[int, int]]
"""Of each model the layers [first, after the last]."""
LAYER = re.compile(r"(.*?\b(?:layers|layer|h|blocks?)\.)(\d+)(\..*)")
"""prefix, number of the layer, rest."""
INPUTS = ("embed", "wte", "wpe", "shared")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys of a configuration that give the number of layers."""


def depths(names: Collection[str]) -> dict[str, float]:
    """How deep each tensor lies: 0 the first layer (and embeddings), 1 the last (and what follows it)."""
    found = {name: match for name in names if (match := LAYER.fullmatch(name))}
    last: dict[str, int] = {}
    for match in found.values():
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    made = {}
    for name in names:
        if name in found:
            prefix, layer = found[name][1], int(found[name][2])
            # a model of one layer has no first: what is written last is for it, as for the head
            made[name] = layer / last[prefix] if last[prefix] else 1.0
        else:
            made[name] = 0.0 if any(word in name for word in INPUTS) else 1.0
    return made


def stack(names: Mapping[str, Collection[str]], slices: Sequence[Slice]) -> dict[str, dict[str, str]]:
    """Name in the output → {model: name there}. `names` are the tensors of each model.

    Layers are numbered anew; embeddings come from the models of the first slice, what follows the layers from those of
    the last. Raises CannotCombine for a layer that a model does not have, and for one that has other tensors.
    """
    made: dict[str, dict[str, str]] = {}
    for own in (slices[0], slices[-1]):
        first = own is slices[0]
        for name in _shared({model: _outside(names[model]) for model in own}):
            if first or not any(word in name for word in INPUTS):
                made[name] = dict.fromkeys(own, name)
    layers = {model: _layers(found) for model, found in names.items()}
    place = 0
    for part in slices:
        for step in range(length(part)):
            at = {model: _layer(layers[model], model, span[0] + step) for model, span in part.items()}
            for prefix, rest in _shared(at):
                made[f"{prefix}{place}{rest}"] = {
                    model: f"{prefix}{span[0] + step}{rest}" for model, span in part.items()
                }
            place += 1
    return made


def length(part: Slice) -> int:
    """Layers of a slice."""
    first, after = next(iter(part.values()))
    return after - first


def _outside(names: Collection[str]) -> list[str]:
    return [name for name in names if not LAYER.fullmatch(name)]


def _shared(found: Mapping[str, Collection[Any]]) -> list[Any]:
    """What all models have; raises CannotCombine where one lacks something."""
    whole: set[Any] = set().union(*found.values())
    for model, own in found.items():
        if lacking := sorted(whole - set(own)):
            words = ", ".join("".join(name) for name in lacking[:3])
            raise CannotCombine(f"{model} lacks {words}, which another model of the slice has: they cannot be merged")
    return sorted(whole)


def _layer(layers: Mapping[int, list[tuple[str, str]]], model: str, number: int) -> list[tuple[str, str]]:
    if number not in layers:
        raise CannotCombine(f"{model} has layers 0 to {max(layers, default=-1)}: no layer {number}")
    return layers[number]


def _layers(names: Collection[str]) -> dict[int, list[tuple[str, str]]]:
    found: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            found.setdefault(int(match[2]), []).append((match[1], match[3]))
    return found


def restacked(configs: Mapping[str, Mapping[str, Any]], reference: str, slices: Sequence[Slice]) -> dict[str, Any]:
    """The configuration of the stack: that of `reference`, with as many layers as there are now.

    What it lists for each layer (`layer_types`, for example) follows the layers.
    """
    config = dict(configs[reference])
    key = next((k for k in COUNTS if k in config), None)
    if key is None:
        raise CannotCombine(f"{reference}: expected a number of layers in its configuration, found none")
    for name, value in config.items():
        if isinstance(value, list) and len(value) == config[key] and name != "architectures":
            config[name] = [v for part in slices for v in _entries(configs, reference, part, name)]
    return config | {key: sum(map(length, slices))}


def _entries(configs: Mapping[str, Mapping[str, Any]], reference: str, part: Slice, name: str) -> list[Any]:
    model = reference if reference in part else next(iter(part))
    return configs[model][name][slice(*part[model])]
