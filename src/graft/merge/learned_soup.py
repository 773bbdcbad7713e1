"""A learned soup: the shares of the models in the mean are learned by gradient on held-out data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from graft.merge.prepared import ChoosingSettings, Prepared, as_written
from graft.settings import DataRef, ModelRef

if TYPE_CHECKING:
    from graft.verb import Job


class Settings(ChoosingSettings):
    """`sum_m softmax(α)_m θ_m`, where α makes the loss on held-out data small; for each layer, if asked for."""

    method: Literal["learned_soup"] = "learned_soup"
    models: Annotated[list[ModelRef], Field(min_length=2, description="Models; their shares are learned.")]
    on: Annotated[DataRef, Field(description="Held-out data with its split, such as `mixed.dev`.")]
    by_layer: Annotated[bool, Field(description="Each layer, and what lies outside of all, has shares of its own.")] = (
        False
    )
    temperature: Annotated[
        bool,
        Field(description="Learn a factor of the logits beside the shares, as in the paper; it is noted, not written."),
    ] = False
    epochs: Annotated[int, Field(ge=1, description="Times that the data is gone through.")] = 3
    learning_rate: Annotated[float, Field(gt=0, description="Learning rate of AdamW, constant.")] = 0.1
    batch_size: Annotated[int, Field(ge=1, description="Rows in a step.")] = 16
    length: Annotated[int, Field(ge=2, description="Tokens in a row at most.")] = 512
    rows: Annotated[int, Field(ge=1, description="Rows of the data that are read at most.")] = 256


def prepare(job: Job, settings: Settings) -> Prepared:
    """Learns the shares; what is merged is the linear soup with the best of them, equal ones if nothing is better.

    Wortsman et al. 2022, arXiv:2203.05482, appendix I.
    """
    from graft.merge import linear
    from graft.merge._learning import learn
    from graft.merge.varying import parse_varying

    learned = learn(job, settings)
    raw = {"models": learned.weights(settings.names), **as_written(settings)}
    return Prepared(parse_varying(linear.Settings, raw), {"learned_soup": learned.notes()})
