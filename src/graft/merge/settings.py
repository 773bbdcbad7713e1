"""What every `merge:` may say. Light. Each method adds its own options beside these."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from graft.settings import Bytes, ModelRef, Settings


class MergeSettings(Settings):
    """One model out of the weights of several."""

    method: Annotated[str, Field(description="How the weights are combined.")]
    models: Annotated[
        list[ModelRef] | dict[ModelRef, float],
        Field(min_length=1, description="Models, or models with their weights (1 each where none are given)."),
    ]
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Field(description="Type of the weights written; none: that of the base, or of the first model."),
    ] = None
    force: Annotated[
        bool, Field(description="Merge even what is not of one initialisation or vocabulary; the manifest says so.")
    ] = False
    shard: Annotated[Bytes, Field(gt=0, description="Largest size of one file of weights.")] = 5 * 10**9

    @model_validator(mode="after")
    def _once(self) -> MergeSettings:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"expected each model once, found {', '.join(self.names)}")
        if self.base_name is not None and self.base_name in self.names:
            raise ValueError(f"expected a base that is not among the models, found {self.base_name} there")
        return self

    @property
    def names(self) -> list[str]:
        """The models that are combined, in order, the base not among them."""
        return list(self.models)

    @property
    def weights(self) -> list[float]:
        """One weight a model."""
        return list(self.models.values()) if isinstance(self.models, dict) else [1.0] * len(self.models)

    @property
    def base_name(self) -> str | None:
        """The model that the others are measured from, where the method has one."""
        return getattr(self, "base", None)

    @property
    def parents(self) -> list[str]:
        """All models that are read; the first gives configuration, tokenizer and stored types."""
        return [*([self.base_name] if self.base_name is not None else []), *self.names]


class DeltaSettings(MergeSettings):
    """One model out of a base and the differences (task vectors) of models tuned from it."""

    base: Annotated[ModelRef, Field(description="The model that the others were tuned from.")]
