"""What `pretrain:` may say. Light."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graft.data.objectives import ObjectiveSettings
from graft.settings import DataRef, ModelRef, Parameters, Settings
from graft.train.settings import TrainSettings


class NewTokenizer(Settings):
    """A tokenizer to train on the train split."""

    algorithm: Annotated[Literal["bpe", "unigram", "wordpiece"], Field(description="How tokens are found.")] = "bpe"
    size: Annotated[int, Field(ge=260, description="Number of tokens.")] = 4096


class TokenizerOf(Settings):
    """The tokenizer of another model, so that the two share a vocabulary."""

    of: Annotated[ModelRef, Field(description="A model of the recipe, or a folder.")]


class TokenizerAt(Settings):
    """A tokenizer in a folder."""

    path: Annotated[str, Field(description="A folder with `tokenizer.json`, relative to the recipe's.")]


class PretrainSettings(TrainSettings):
    """A model trained from scratch."""

    data: Annotated[DataRef, Field(description="Data set to train on (its train split; dev for the dev score).")]
    architecture: Annotated[
        Literal["decoder", "encoder", "encoder-decoder"], Field(description="Kind of transformer.")
    ] = "decoder"
    size: Annotated[
        Parameters | None,
        Field(
            gt=0,
            description="Parameters, to within a tenth: width and depth follow from it; or give `hidden` and `layers`.",
        ),
    ] = None
    hidden: Annotated[int | None, Field(gt=0, description="Channels.")] = None
    layers: Annotated[int | None, Field(gt=0, description="Layers (of each half of an encoder-decoder).")] = None
    heads: Annotated[
        int | None, Field(gt=0, description="Attention heads; None: of about 32 channels each, 64 from 512 on.")
    ] = None
    positions: Annotated[
        Literal["rotary", "learned", "sinusoidal", "alibi", "relative"] | None,
        Field(
            description="Position encoding; None: rotary, for encoder-decoders relative. A decoder takes all but "
            "relative, an encoder rotary and learned, an encoder-decoder relative, learned and sinusoidal."
        ),
    ] = None
    length: Annotated[int, Field(ge=8, description="Context in tokens.")] = 256
    dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout while training.")] = 0.0
    tokenizer: Annotated[
        NewTokenizer | TokenizerOf | TokenizerAt,
        Field(description="A tokenizer to train (`{algorithm: bpe, size: 4096}`), `{of: MODEL}` or `{path: FOLDER}`."),
    ] = NewTokenizer()
    objective: Annotated[
        ObjectiveSettings | None, Field(description="None: causal, masked or span, by the architecture.")
    ] = None
