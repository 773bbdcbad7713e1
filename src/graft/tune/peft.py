"""Any adapter of the package peft: LoHa, LoKr, OFT, VeRA, … in the model; p-tuning and other prompts before text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator, model_validator

from graft.adapters.foreign_mixture import expert_names
from graft.settings import Settings as Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Settings(Base):
    """A configuration as peft takes it: `{peft: {peft_type: LOHA, r: 4, target_modules: all-linear}}`."""

    config: Annotated[dict[str, Any], Field(min_length=1, description="peft's settings; they may stand here directly.")]

    @model_validator(mode="before")
    @classmethod
    def _direct(cls, raw: Any) -> Any:
        return {"config": raw} if isinstance(raw, dict) and set(raw) != {"config"} else raw

    @field_validator("config")
    @classmethod
    def _experts(cls, config: dict[str, Any]) -> dict[str, Any]:
        expert_names(config)
        return config

    def named_inside(self, path: tuple[str | int, ...]) -> Iterator[tuple[str, str, tuple[str | int, ...]]]:
        """The experts of X-LoRA."""
        for name, ref in (expert_names(self.config) or {}).items():
            yield "model", ref, (*path, "adapters", name)


def apply(
    model: PreTrainedModel,
    settings: Settings,
    base: Path | None = None,
    name: str = "adapter",
    folders: Mapping[str, Path] | None = None,
) -> PreTrainedModel:
    """The model with peft's adapter, which alone is trainable. Raises RequestError for what peft refuses.

    `folders`: where the models lie that the settings name.
    """
    from graft.adapters.foreign import wrap

    return wrap(model, settings.config, base, name, folders)
