"""A cache that holds two readings of one text: beside each layer a second one, which goes wherever the first goes.

Beams, cropping, repeating and what else is done to a cache is done to its layers; a layer with a second one does it to
both, whichever cache holds it, and looks to everybody else as it did before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from transformers.cache_utils import Cache, DynamicCache

from graft.errors import RequestError

FOLLOWED = (
    "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset", "offload", "prefetch", "keep",
    "activate_past_recording",
)  # fmt: skip
"""What is done to layers beside writing into them."""


class Paired:
    """Mixed into the class of a layer: `second` is the layer of the other reading."""

    __slots__ = ()
    second: Any


def _copied(layer: Any) -> Any:
    made = object.__new__(type(layer))
    made.__dict__ |= layer.__dict__ | {"second": copy.copy(layer.second)}
    return made


def _followed(name: str) -> Any:
    def both(self: Any, *args: Any, **kwargs: Any) -> None:
        getattr(super(_own_class(self), self), name)(*args, **kwargs)
        getattr(self.second, name)(*args, **kwargs)

    return both


def _own_class(layer: Any) -> Any:
    return next(cls for cls in type(layer).__mro__ if Paired in cls.__bases__)


@lru_cache(maxsize=64)
def _paired_class(cls: type) -> type:
    followed = {name: _followed(name) for name in FOLLOWED if hasattr(cls, name)}
    own = {"__module__": cls.__module__, "__copy__": _copied, "_layer_type": None, **followed}
    return type(cls.__name__, (cls, Paired), own)


def readings(layer: Any) -> list[Any]:
    """A layer of a cache and, where it has one, that of the second reading."""
    return [layer, layer.second] if isinstance(layer, Paired) else [layer]


def both(cache: Cache, others: Cache) -> Iterator[tuple[Any, Any]]:
    """Layers of two caches that have the same place in them, and of the same reading; `cache` gets a second reading
    where the others have one."""
    for layer, other in zip(cache.layers, others.layers, strict=True):
        if isinstance(other, Paired) and not isinstance(layer, Paired):
            pair(layer, copy.deepcopy(layer))
        yield from zip(readings(layer), readings(other), strict=False)


def pair(layer: Any, second: Any) -> None:
    """Give a layer (in place) a second one."""
    plain: Any = type(layer)
    layer.__class__ = _paired_class(plain)
    layer.second = second


def second_of(cache: Cache, config: Any) -> Cache:
    """The second reading that `cache` holds: a cache of its kind, made where nothing was read yet.

    `config`: that of the model, for a cache that was made without one. Raises RequestError for a cache that holds text
    of which it has no second reading.
    """
    if (kind := cache.layer_class_to_replicate) is not None:
        count = len(DynamicCache(config=config.get_text_config(decoder=True)).layers)
        cache.layers.extend(kind() for _ in range(count - len(cache.layers)))
    for layer in cache.layers:
        if isinstance(layer, Paired):
            continue
        if _holds_text(layer):
            raise RequestError(
                "expected a cache that this very model filled, or an empty one, found one that lacks what its experts "
                "are chosen by: a mixture of experts reads each text twice and keeps both"
            )
        pair(layer, copy.deepcopy(layer))
    made = copy.copy(cache)
    layers: list[Any] = cache.layers
    made.layers = [layer.second for layer in layers]
    return made


def _holds_text(layer: Any) -> bool:
    recurrent = getattr(layer, "has_previous_state", {})
    return any(recurrent.values()) or bool(int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0)
