"""What methods on matrices, and methods that read data, may be told. Light."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from graft.merge.settings import DeltaSettings, MergeSettings
from graft.settings import DataRef, ModelRef, Settings, Tokens


class SubspaceSettings(DeltaSettings):
    """A base plus task vectors that are combined in the space of their singular vectors, a matrix at a time."""

    scale: Annotated[float, Field(description="Factor of the combined task vector, λ in the papers.")] = 1.0


class OnData(Settings):
    """What is read to decide how the weights are combined."""

    on: Annotated[
        DataRef | dict[ModelRef, DataRef],
        Field(description="Data set that is read, such as `mixed.train`, or one for each model."),
    ]
    tokens: Annotated[Tokens, Field(gt=0, description="Tokens that are read for each model.")] = 65_536
    length: Annotated[
        int | None, Field(ge=8, description="Context in tokens; none: what the model takes, 512 at most.")
    ] = None

    @model_validator(mode="after")
    def _for_each(self) -> OnData:
        assert isinstance(self, MergeSettings)
        if isinstance(self.on, dict) and set(self.on) != set(self.names):
            found = ", ".join(self.on)
            raise ValueError(f"expected a data set for each of {', '.join(self.names)}, found one for {found}")
        return self

    def data_of(self, model: str) -> str:
        """The data set that is read for a model."""
        return self.on[model] if isinstance(self.on, dict) else self.on
