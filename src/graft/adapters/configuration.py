"""The configuration in a folder of adapters, which the Auto classes of `transformers` learn of."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from graft.folders import ADAPTED


class AdaptedConfig(PretrainedConfig):
    """The configuration in a folder of adapters: that of the frozen model, and what the adapters are."""

    model_type = ADAPTED

    def __init__(self, graft_adapted: dict[str, Any] | None = None, **kwargs: Any):
        self.graft_adapted = dict(graft_adapted or {})
        super().__init__(**kwargs)


AutoConfig.register(ADAPTED, AdaptedConfig, exist_ok=True)
