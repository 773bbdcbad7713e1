"""Whether stored weights fit an architecture: their names and shapes are compared, no weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]
NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")
"""Part of a tensor's name that says which of several equal blocks it is in."""
OLD_NAMES = re.compile(r"LayerNorm\.(gamma|beta)$|\.weight_[gv]$|(^|\.)language_model\.")
"""Names of old checkpoints, whatever the architecture, that `transformers` changes while it loads them."""


@dataclass(frozen=True)
class Architecture:
    """The tensors of a `transformers` class."""

    name: str
    """Name of the class."""
    shapes: Shapes
    tied: Mapping[str, str]
    """Tensors that are the same as another one and need not be stored."""
    prefix: str
    """What checkpoints of the model without its head leave out before names."""
    converted: bool
    """Checkpoints name their tensors otherwise and are converted while they are loaded."""
    computed: Sequence[str] = ()
    """Tensors that the model makes itself where they are not stored (sinusoidal positions)."""


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The architecture of a model, which needs no memory behind its weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    computed = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return Architecture(
        type(model).__name__,
        {name: tuple(value.shape) for name, value in model.state_dict().items()},
        dict(getattr(model, "all_tied_weights_keys", None) or {}),
        f"{model.base_model_prefix}.",
        bool(get_model_conversion_mapping(model, add_legacy=False)),
        tuple(name for name in model.state_dict() if any(re.search(pattern, name) for pattern in computed)),
    )


def misfits(made: Architecture, stored: Shapes) -> list[str]:
    """What the architecture needs and `stored` lacks, or has in another shape, in words."""
    found = {place: shape for name, shape in stored.items() for place in _places(made, name)} | dict(stored)
    # of tensors that are the same, one is enough
    same = {source for tied, source in made.tied.items() if tied in found}
    missing = sorted(set(made.shapes) - set(made.tied) - set(made.computed) - set(found) - same)
    lacks = [f"missing {len(missing)}: {', '.join(missing[:5])}"] if missing else []
    wrong = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in made.shapes.items()
        if name in found and found[name] != shape
    ]
    return [*lacks, *wrong[:5]]


def beyond(made: Architecture, stored: Iterable[str]) -> list[str]:
    """Stored tensors of blocks that the architecture does not have, but others of their kind (a layer too many)."""
    kinds = {NUMBER.sub("#", name) for name in made.shapes}
    blocks = {block for name in made.shapes for block in _blocks(name)}
    return sorted(
        name
        for name in stored
        if any(NUMBER.sub("#", p) in kinds and not blocks.issuperset(_blocks(p)) for p in _places(made, name))
    )


def unread(made: Architecture, stored: Iterable[str]) -> list[str]:
    """Stored tensors that the model has no use for: buffers of old versions, heads of another task.

    Of an architecture that converts names nothing is known, nor of old names.
    """
    if made.converted:
        return []
    known = made.shapes.keys() | made.tied.keys()
    return [name for name in stored if not OLD_NAMES.search(name) and known.isdisjoint(_places(made, name))]


def _places(made: Architecture, name: str) -> tuple[str, ...]:
    """Names under which a model may hold what a checkpoint with or without a head calls `name`."""
    return name.removeprefix(made.prefix), made.prefix + name, name


def _blocks(name: str) -> Iterator[str]:
    return (name[: found.end()] for found in NUMBER.finditer(name))
