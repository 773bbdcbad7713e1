"""The configuration of an ensemble over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig

from graft.ensemble.byte_level.tokenizer import IDS, SIZE
from graft.ensemble.configuration import EnsembleConfig


class ByteEnsembleConfig(EnsembleConfig):
    """As of an ensemble; `cover`: which token sequences count (`byte_model.Cover`). It has no cache of layers and reads
    texts of any length: members that are full go on from their newest half."""

    model_type = "graft_byte_ensemble"

    def __init__(
        self, members: Sequence[dict[str, Any]] = (), *args: Any, cover: dict[str, Any] | None = None, **kwargs: Any
    ):
        kwargs = {name: value for name, value in kwargs.items() if name not in IDS}
        kwargs |= {"vocabulary": "bytes", "architectures": ["EnsembleOverBytes"]}
        super().__init__(members, *args, **kwargs)
        for name, token in IDS.items():
            setattr(self, name, token)
        self.loss_type = "ForCausalLM"
        self.cover = dict(cover or {})
        self.vocab_size = SIZE
        self.num_hidden_layers, self.layer_types = 0, []
        self.max_position_embeddings = None


AutoConfig.register(ByteEnsembleConfig.model_type, ByteEnsembleConfig, exist_ok=True)
