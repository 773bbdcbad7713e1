"""Makes the Auto classes of `transformers` know folders of adapters."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from graft.adapters.configuration import AdaptedConfig

AUTO: tuple[Any, ...] = (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
"""The Auto classes that learn of adapters, those of heads beside adapters included."""


class AdaptedModel:
    """Stands for models with adapters in the Auto classes; what it loads is of the frozen model's own class."""

    config_class = AdaptedConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> Any:
        """The frozen model of a folder with its adapters. `dtype` is honoured."""
        from graft import models

        wanted = kwargs.get("dtype", kwargs.get("torch_dtype"))
        return models.load(pretrained_model_name_or_path, dtype=None if wanted in (None, "auto") else wanted)


def register() -> None:
    """Make the Auto classes of `transformers` know adapters."""
    for auto in AUTO:
        auto.register(AdaptedConfig, AdaptedModel, exist_ok=True)


register()
