"""The common cache of an ensemble: seen by one member, and the text in it for members that read it later."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from graft.errors import RequestError


class CacheView(Cache):
    """A member's span of the ensemble's cache: the very same layer objects.

    A cache that was made without a configuration gets the layers that it lacks. Raises RequestError for one that was
    made for fewer.
    """

    def __init__(self, whole: Cache, start: int, stop: int):
        if (kind := whole.layer_class_to_replicate) is not None:
            whole.layers.extend(kind() for _ in range(stop - len(whole.layers)))
        if len(whole.layers) < stop:
            raise RequestError(
                f"expected a cache with the layers of all members ({stop} or more), found one of {len(whole.layers)}: "
                "make it of the ensemble's configuration, DynamicCache(config=ensemble.config)"
            )
        super().__init__(layers=whole.layers[start:stop])

    def mask(self, mask: Any) -> Any:
        """A mask `[batch, length]` made as long as the keys of a static cache, as biases that follow it (ALiBi) have to
        be; other masks, and for other caches, as they are."""
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or not self.is_compileable:
            return mask
        return torch.nn.functional.pad(mask, (0, self.get_max_length() - mask.shape[-1]))


def keeps_layers(member: Any) -> bool:
    """Whether what a decoder keeps of a text are layers of keys and values, which one cache can hold for several.

    Not so for recurrent or convolutional states, keys of other kinds, and models that keep nothing.
    """
    if member._is_stateful or not member._supports_default_dynamic_cache():
        return False
    if "past_key_values" not in inspect.signature(type(member).forward).parameters:
        return False
    layers = DynamicCache(config=member.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in layers)


@dataclass(frozen=True)
class Text:
    """All that has been read: `ids [batch, length]` and `positions [batch, length]` (-1 where none were given)."""

    ids: torch.Tensor
    positions: torch.Tensor

    def since(self, seen: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The ids and positions of what comes behind the first `seen` tokens."""
        positions = self.positions[:, seen:]
        return self.ids[:, seen:], None if (positions < 0).any() else positions


def grown_text(cache: Cache, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> Text:
    """The text in the cache's first layer with `input_ids [batch, new]` behind it, where it stays.

    A layer like the others, so that beams, cropping and repeating act on it as on them.
    """
    length = int(cache.get_seq_length(0)) + input_ids.shape[1]
    positions = torch.full_like(input_ids, -1) if position_ids is None else position_ids.expand_as(input_ids)
    ids, places = cache.update(input_ids[:, None, :, None], positions[:, None, :, None], 0)
    return Text(ids[:, 0, :length, 0], places[:, 0, :length, 0])
