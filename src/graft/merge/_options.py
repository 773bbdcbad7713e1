"""What methods on matrices, and methods that read data, may be told. Light."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from graft.merge.settings import DeltaSettings, MergeSettings
from graft.settings import DataRef, ModelRef, Number, Tokens
from graft.train.estimate import cpu_flops, on_this_cpu
from graft.verb import Facts

DECOMPOSING_FLOPS = 60e9
"""Guess: floating-point operations a second that decomposing matrices reaches on a few CPU cores."""


class SubspaceSettings(DeltaSettings):
    """A base plus task vectors that are combined in the space of their singular vectors, a matrix at a time."""

    scale: Annotated[Number, Field(description="Factor of the combined task vector, λ in the papers.")] = 1.0

    @property
    def in_float64(self) -> bool:
        """Decompositions."""
        return True

    def cost(self, model: Facts) -> tuple[int, float, str]:
        """(bytes held beside the stream, seconds beside it, what that rests on) for models like this one."""
        wide = int(model.config.get("hidden_size", model.config.get("n_embd", 0)))
        matrix = wide * max(int(model.config.get("intermediate_size", 4 * wide)), wide)
        layers = int(model.config.get("num_hidden_layers", model.config.get("n_layer", 0)))
        count = len(self.names)
        # about 20 operations a number and column for a decomposition, of n + 2 matrices; a layer has about four such
        work = 20 * 4 * layers * matrix * wide * (count + 2)
        rests_on = "one layer's matrices whole, decomposed at 60 GFLOP/s"
        return 4 * matrix * (5 * count + 4), work / DECOMPOSING_FLOPS, rests_on


class RowSettings(MergeSettings):
    """Vectors that are whole tensors or their rows."""

    by: Annotated[
        Literal["tensor", "row"], Field(description="What is taken as one vector, with angles of its own.")
    ] = "tensor"

    @property
    def in_float64(self) -> bool:
        """The angles of rows."""
        return self.by == "row"


def by_rows(settings: RowSettings) -> bool:
    """Whether pieces hold whole rows: only where rows are the vectors."""
    return settings.by == "row"


class OnData(MergeSettings):
    """What is read to decide how the weights are combined."""

    on: Annotated[
        DataRef | dict[ModelRef, DataRef] | None,
        Field(description="Data set that is read, such as `mixed.train`, or one for each model."),
    ]
    tokens: Annotated[Tokens, Field(gt=0, description="Tokens that are read for each model.")] = 65_536
    length: Annotated[
        int | None, Field(ge=8, description="Context in tokens; none: what the model takes, 512 at most.")
    ] = None

    @model_validator(mode="after")
    def _for_each(self) -> OnData:
        if self.on is None and type(self).model_fields["on"].is_required():
            raise ValueError("expected a data set in `on`, found none")
        if isinstance(self.on, dict) and set(self.on) != set(self.names):
            found = ", ".join(self.on)
            raise ValueError(f"expected a data set for each of {', '.join(self.names)}, found one for {found}")
        return self

    @model_validator(mode="after")
    def _enough(self) -> OnData:
        if self.length is not None and self.tokens < self.length:
            raise ValueError(f"expected at least {self.length} tokens, one row, found {self.tokens}")
        return self

    @property
    def in_float64(self) -> bool:
        """Sums over a model's statistics, and regressions."""
        return self.on is not None

    def passes(self, model: Facts) -> float:
        """Tokens that are read forward and backward, over all models; a forward pass counts a third."""
        return float(self.tokens * len(self.names))

    def cost(self, model: Facts) -> tuple[int, float, str]:
        """(bytes held beside the stream, seconds beside it, what that rests on) for models like this one."""
        if self.on is None:
            return 0, 0.0, ""
        seconds = 6 * model.parameters * self.passes(model) / cpu_flops()
        return 2 * 4 * model.parameters, seconds, f"two models in float32 and text read {on_this_cpu()}"

    def data_of(self, model: str) -> str:
        """The data set that is read for a model."""
        assert self.on is not None
        return self.on[model] if isinstance(self.on, dict) else self.on


class WholeModel(OnData):
    """What is found by running the merged model: it takes the models as they are, with one weight each."""

    @model_validator(mode="after")
    def _unchanged(self) -> WholeModel:
        asked = {"slices": self.slices, "part": self.part, "vocabulary": self.vocabulary}
        if found := [name for name, value in asked.items() if value]:
            words = "expected whole models of one vocabulary"
            raise ValueError(f"{words}, found `{found[0]}`: {self.method} runs what it merges")
        return self

    @property
    def of_the_whole_model(self) -> frozenset[str]:
        """One weight for a model everywhere, and one share of it."""
        return frozenset({"models", "density"})
