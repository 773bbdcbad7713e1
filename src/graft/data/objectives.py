"""Objectives: how what is trained on becomes a task, and which goes with which architecture. Light: pydantic only.

causal    every token is predicted from those before it (GPT).
prefix    a prefix is read in both directions, the rest is predicted from it (Raffel et al. 2020, section 3.2.1).
masked    tokens are hidden and predicted from both sides (BERT, Devlin et al. 2019, section 3.1).
span      runs of tokens are replaced by sentinels, which the decoder expands (T5, Raffel et al. 2020, section 3.1.4).

`objective_rows.py` makes the rows that a model is trained on by them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from graft.errors import CannotCombine
from graft.settings import Settings


class Causal(Settings):
    """Every token is predicted from those before it."""

    kind: Literal["causal"] = "causal"


class Prefix(Settings):
    """A prefix (of a prompt with a completion: the prompt) is read in both directions, the rest predicted.

    The configuration of what is trained so says `prefix_lm: true`: graft then scores and writes behind prompts that are
    read in both directions too.
    """

    kind: Literal["prefix"] = "prefix"


class Masked(Settings):
    """Hidden tokens are predicted from both sides."""

    kind: Literal["masked"] = "masked"
    share: Annotated[float, Field(gt=0, lt=1, description="Share of the tokens that are predicted.")] = 0.15
    masked: Annotated[float, Field(ge=0, le=1, description="Share of these that become the mask token.")] = 0.8
    random: Annotated[float, Field(ge=0, le=1, description="Share of these that become a random token.")] = 0.1

    @model_validator(mode="after")
    def _at_most_all(self) -> Masked:
        if self.masked + self.random > 1:
            raise ValueError(f"expected masked + random of at most 1, found {self.masked} + {self.random}")
        return self


class Span(Settings):
    """Runs of tokens are replaced by sentinels, which the decoder expands.

    Data that says what is to be produced (a completion, a label, a target) goes in whole instead: what is read into the
    encoder, what is to be produced into the decoder.
    """

    kind: Literal["span"] = "span"
    share: Annotated[float, Field(gt=0, lt=1, description="Share of the tokens that are taken out.")] = 0.15
    mean_length: Annotated[float, Field(ge=1, description="Mean length of a run in tokens.")] = 3.0


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


ObjectiveSettings = Annotated[Causal | Prefix | Masked | Span, Field(discriminator="kind"), BeforeValidator(_named)]
"""`causal`, or with its options `{kind: masked, share: 0.3}`."""

DEFAULT: dict[str, type[Settings]] = {"decoder": Causal, "encoder": Masked, "encoder-decoder": Span}
ALLOWED = {"decoder": ("causal", "prefix"), "encoder": ("masked",), "encoder-decoder": ("span",)}


PREFIX_LM = "prefix_lm"
"""What the configuration of a decoder says that was last trained by the objective `prefix`."""


def is_prefix_lm(config: Any) -> bool:
    """Whether a configuration (or a mapping of what it says) is that of a prefix LM."""
    return bool(config.get(PREFIX_LM) if isinstance(config, Mapping) else getattr(config, PREFIX_LM, False))


def told_of(config: Mapping[str, Any], objective: Settings) -> dict[str, Any]:
    """A configuration after a training by `objective`: whether it is a prefix LM's."""
    plain = {key: value for key, value in config.items() if key != PREFIX_LM}
    return plain | {PREFIX_LM: True} if isinstance(objective, Prefix) else plain


def objective_for(architecture: str, settings: Settings | None, config: Any = None) -> Settings:
    """The objective; without one that of the model with this `config` (a prefix LM stays one), or the architecture's.

    Raises CannotCombine where objective and architecture do not go together.
    """
    usual = Prefix if architecture == "decoder" and is_prefix_lm(config) else DEFAULT[architecture]
    chosen = settings or usual()
    if chosen.kind not in ALLOWED[architecture]:  # type: ignore[attr-defined]
        raise CannotCombine(
            f"objective {chosen.kind!r} does not go with architecture {architecture!r}, which trains by: "  # type: ignore[attr-defined]
            f"{', '.join(ALLOWED[architecture])}"
        )
    return chosen


def lacking(settings: Settings, has: Collection[str], format: str | None) -> str | None:
    """What a tokenizer that has these (of `end`, `mask`, `sentinels`) lacks to train by an objective; None: nothing.

    Of data whose `format` is not known (None) nothing is said that depends on it.
    """
    if "end" not in has:
        return "training needs a tokenizer with an end token"
    if isinstance(settings, Masked) and "mask" not in has:
        return "masked LM needs a tokenizer with a mask token"
    if isinstance(settings, Span) and format == "text" and "sentinels" not in has:
        return "span corruption needs a tokenizer with sentinels (<extra_id_0>, …)"
    return None


def unspeakable(objective: Settings, name: str, has: Collection[str] | None, format: str | None) -> list[str]:
    """Why the tokenizer of the model (or in the folder) `name` does not do for an objective; a sentence, or nothing."""
    if has is None:
        return []
    if "text" not in has:
        return [f"{name} has no tokenizer: put its tokenizer.json into the folder, or name a model that has one"]
    if lost := lacking(objective, has, format):
        return [f"{lost}; that of {name} has none: take a new one (`tokenizer: {{size: …}}`), or another model's"]
    return []
