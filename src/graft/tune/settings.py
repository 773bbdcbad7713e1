"""What `tune:` may say. Light."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from graft.data.objectives import ObjectiveSettings
from graft.settings import DataRef, ModelRef
from graft.train.settings import TrainSettings


class TuneSettings(TrainSettings):
    """A model tuned from another one."""

    from_: Annotated[ModelRef, Field(alias="from", description="The model to start from.")]
    data: Annotated[DataRef, Field(description="Data set to train on (its train split; dev for the dev score).")]
    method: Annotated[
        dict[str, Any],
        Field(
            description="`full`, `lora`, … (`graft tune --methods` lists them), or with options `{lora: {rank: 16}}`."
        ),
    ] = {"full": {}}
    fold: Annotated[
        bool,
        Field(
            description="Fold the adapter into the weights: a whole model. Without it the node is a small folder that "
            "names the model it started from."
        ),
    ] = False
    objective: Annotated[
        ObjectiveSettings | None, Field(description="None: causal, masked or span, by the architecture.")
    ] = None
    length: Annotated[
        int | None, Field(ge=8, description="Context in tokens; None: what the model was made for, 1024 at most.")
    ] = None
    learning_rate: float = Field(
        3e-4, gt=0, description="learning rate at its peak; few weights want more, 1e-3 and above"
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("method"), str):
            return {**raw, "method": {raw["method"]: {}}}
        return raw


LONGEST = 1024
"""Tokens of context that tuning uses where nothing is said, if the model can take as many."""


def longest(config: Mapping[str, Any], *others: Any) -> int:
    """The longest context that a configuration (and `others`, if whole numbers) names, 1024 at most."""
    named = [config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min([LONGEST, *(count for count in (*named, *others) if isinstance(count, int) and count > 0)])
