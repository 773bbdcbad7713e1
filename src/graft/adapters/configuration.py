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
        # types that only the frozen model has are checked where that is made
        types = kwargs.pop("mlp_layer_types", None)
        super().__init__(**kwargs)
        if types is not None:
            self.mlp_layer_types = types


AutoConfig.register(ADAPTED, AdaptedConfig, exist_ok=True)
