"""The common cache of an ensemble, seen by one member."""

from __future__ import annotations

from transformers.cache_utils import Cache


class CacheView(Cache):
    """A member's span of the ensemble's cache: the very same layer objects."""

    def __init__(self, whole: Cache, start: int, stop: int):
        super().__init__(layers=whole.layers[start:stop])
