"""What every `merge:` may say. Light. Each method adds its own options beside these."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from graft.settings import Bytes, ModelRef, Settings

PerModel = float | dict[ModelRef, float]
"""One number for all models, or one for each."""


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

    def each(self, value: PerModel) -> list[float]:
        """One number a model. Raises ValueError where a mapping does not name the models."""
        if not isinstance(value, dict):
            return [value] * len(self.names)
        if set(value) != set(self.names):
            raise ValueError(f"expected a value for each of {', '.join(self.names)}, found {', '.join(value)}")
        return [value[name] for name in self.names]

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


class SparseSettings(DeltaSettings):
    """A base plus sparse task vectors."""

    density: Annotated[PerModel, Field(description="Share of each task vector that is kept, in (0, 1].")] = 0.5
    scale: Annotated[float, Field(description="Factor of the combined task vector, λ in the papers.")] = 1.0
    normalise: Annotated[bool, Field(description="Divide by the sum of the weights that take part.")] = False

    @property
    def densities(self) -> list[float]:
        """One density a model."""
        return self.each(self.density)

    @model_validator(mode="after")
    def _shares(self) -> SparseSettings:
        if wrong := [d for d in self.densities if not 0 < d <= 1]:
            raise ValueError(f"expected a density above 0 and at most 1, found {wrong[0]}")
        return self
