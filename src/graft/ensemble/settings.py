"""What `ensemble:` may say. Light."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from graft.settings import DataRef, ModelRef, Settings


class GateSettings(Settings):
    """Weights that follow the context; written `gate: 16` where only the units are said."""

    units: Annotated[int, Field(ge=0, description="0: a linear gate; more: one layer of so many units.")] = 0
    hidden_states: Annotated[
        bool, Field(description="The gate also sees the last hidden state of the members it looks at.")
    ] = False
    looks_at: Annotated[
        list[ModelRef] | None,
        Field(min_length=1, description="The members whose predictions the gate sees, such as a small one; null: all."),
    ] = None
    skip: Annotated[
        float,
        Field(ge=0, lt=1, description="A weight of at most so much counts as zero; who is not looked at is not run."),
    ] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _units(cls, raw: Any) -> Any:
        return {"units": raw} if isinstance(raw, int) and not isinstance(raw, bool) else raw


class FittedWeights(Settings):
    """Weights found on held-out text that no member was trained on."""

    fit: Annotated[DataRef, Field(description="Data set and split, such as `mixed.dev`.")]
    documents: Annotated[
        int,
        Field(gt=0, description="At most so many documents of each data set, drawn from all of it by their hashes."),
    ] = 200
    top_k: Annotated[
        int | None,
        Field(
            gt=0,
            description="Of a product: so many of each member's likeliest tokens are kept at every token, the others "
            "as one tail (approximate, but of all tokens of a long text); null: whole distributions.",
        ),
    ] = None
    gate: Annotated[
        GateSettings | None,
        Field(description="Weights that follow the context: `0`, a linear gate; `16`, one with so many units."),
    ] = None


class DropoutSettings(Settings):
    """Dropout at test time: passes of one model, each with masks of its own, count as members (Monte-Carlo dropout)."""

    passes: Annotated[int, Field(gt=0, description="How many passes.")] = 8
    share: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Share of the channels that is dropped before every linear layer; null: at the model's own "
            "dropout layers, with their own shares.",
        ),
    ] = None
    seed: Annotated[int | None, Field(ge=0, description="Seed of the masks; null: the ensemble's.")] = None


class MemberSettings(Settings):
    """A member of which more is said than its name; one that stands for several shares its weight among them evenly."""

    model: Annotated[ModelRef, Field(description="The model.")]
    weight: Annotated[float | None, Field(description="Its weight; all members have one or none.")] = None
    checkpoint: Annotated[
        str | None, Field(description="A checkpoint that its training kept, such as `step-400`, or `ema`.")
    ] = None
    checkpoints: Annotated[
        str | None,
        Field(pattern=r"^(all|last [1-9]\d*)$", description="Several of them as members: `last 3`, or `all`."),
    ] = None
    dropout: Annotated[DropoutSettings | None, Field(description="Passes with dropout as members.")] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, Field(description="Loaded in this type; null: as stored.")
    ] = None
    device: Annotated[
        str | None,
        Field(description="Where it stays, such as `cuda:1`; null: with the others. Devices work at the same time."),
    ] = None

    @model_validator(mode="after")
    def _one_choice(self) -> MemberSettings:
        if self.checkpoint is not None and self.checkpoints is not None:
            raise ValueError("expected `checkpoint` or `checkpoints`, found both")
        return self

    @property
    def last_checkpoints(self) -> int | None:
        """How many checkpoints are wanted; None for all."""
        return None if self.checkpoints in (None, "all") else int(str(self.checkpoints).removeprefix("last "))

    @property
    def several(self) -> bool:
        """Whether it stands for several members."""
        return self.checkpoints is not None or self.dropout is not None


class CoverSettings(Settings):
    """Which token sequences count where the ensemble is over bytes."""

    tokenisations: Annotated[
        Literal["all", "canonical"],
        Field(description="`all` that write the text, or `canonical`: those that the member's tokenizer makes."),
    ] = "all"
    drop: Annotated[
        float,
        Field(ge=0, lt=1, description="Sequences that hold this share of a byte's probability are not read; 0: exact."),
    ] = 0.03
    join: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Sequences that hold this share are taken to go on as the likeliest that ends there; 0: exact.",
        ),
    ] = 0.3
    most: Annotated[
        int | None, Field(gt=0, description="Complete sequences that are read at most at each byte; null: all (exact).")
    ] = 16


class OutputSettings(Settings):
    """How members write the answers that a rule for whole outputs chooses from. `generate` may say otherwise."""

    draw: Annotated[
        Literal["samples", "beams"], Field(description="Whether the answers are sampled or a search's best.")
    ] = "beams"
    candidates: Annotated[int, Field(gt=0, description="Answers that each member writes.")] = 1
    temperature: Annotated[float, Field(gt=0, description="Of samples.")] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, description="Of samples: the likeliest tokens of this share.")] = 1.0
    seed: Annotated[int, Field(ge=0, description="Of samples: the same every time.")] = 0


MOVE = ("experts", "log_linear")
"""Rules by which language models of the target may move a translator, which stands first."""

HAVE_PARTS = ("linear", "log_linear", "experts", "contrastive")
"""Rules in which members have parts in every token: the mixture, and what is made of products."""

NOT_A_MIXTURE = "a union of vocabularies is for mixtures (linear), found {!r}: other rules need the same tokens"


class EnsembleSettings(Settings):
    """Members whose predictions are combined at every token."""

    combine: Annotated[
        dict[str, Any],
        Field(
            description="The rule: `linear` (a mixture of probabilities), `log_linear` (their renormalised product), "
            "`experts`, `contrastive`; of classes or whole outputs `majority`, `ranked`, `least_risk`; with options "
            "`{experts: {alpha: 2}}`."
        ),
    ] = {"linear": {}}
    members: Annotated[
        list[ModelRef | MemberSettings] | dict[ModelRef, float],
        Field(min_length=1, description="Models, models with their weights, or more of each (checkpoints, dropout)."),
    ]
    weights: Annotated[
        Literal["uniform"] | FittedWeights | None,
        Field(description="`uniform`, or `{fit: DATA.dev}`; left out where `members` gives weights."),
    ] = None
    vocabulary: Annotated[
        Literal["same", "union", "bytes"],
        Field(
            description="`same`: members of one vocabulary, others are refused; `union`: a token that only some "
            "members have gets what they give (linear); `bytes`: members with any tokenizers, combined at every byte."
        ),
    ] = "same"
    boundaries: Annotated[
        int | None,
        Field(
            gt=0,
            description="Of a union that writes greedily: the first member drafts so many tokens, the others are "
            "combined with it only where a token of each ends and where they would not write the same. Faster, and "
            "another text than that of the whole union; null: combined at every token.",
        ),
    ] = None
    cover: Annotated[CoverSettings | None, Field(description="Which token sequences count (`vocabulary: bytes`).")] = (
        None
    )
    draft: Annotated[
        ModelRef | None,
        Field(description="The member that drafts blocks of tokens where the ensemble speculates; best a fast one."),
    ] = None
    show: Annotated[
        DataRef | None,
        Field(
            description="Data set and split whose first document the report shows, with who speaks at which token "
            "(mixtures and products of decoders); null: the one that weights are fitted on."
        ),
    ] = None
    self_contained: Annotated[bool, Field(description="Copy the members into the ensemble's folder.")] = False

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("combine"), str):
            return {**raw, "combine": {raw["combine"]: {}}}
        return raw

    @field_validator("weights", mode="before")
    @classmethod
    def _fitted(cls, raw: Any) -> Any:
        numbers = list(raw.values()) if isinstance(raw, dict) and not raw.keys() & FittedWeights.model_fields else raw
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if numbers and all(isinstance(each, int | float) and not isinstance(each, bool) for each in numbers):
            where = "numbers stand beside the members: `members: {a: 0.5, b: 0.5}`"
            raise ValueError(f"expected `uniform` or `{{fit: DATA.dev}}`, found {raw!r}; {where}")
        return raw

    @model_validator(mode="after")
    def _one_way(self) -> EnsembleSettings:
        weighted = [entry.weight is not None for entry in self.entries]
        if any(weighted) and self.weights is not None:
            raise ValueError("expected weights beside the members or in `weights`, found both")
        if any(weighted) and not all(weighted):
            raise ValueError("expected a weight for every member or for none, found some")
        self._check_once()
        self._check_named("as draft", [self.draft] if self.draft is not None else [])
        gate = self.weights.gate if isinstance(self.weights, FittedWeights) else None
        self._check_named("that the gate looks at", gate.looks_at or [] if gate else [])
        return self

    def _check_once(self) -> None:
        """A path written in two ways is one member; a link to a folder is another, with a name of its own."""
        each = [
            entry.model_copy(update={"weight": None, "model": os.path.abspath(entry.model)}) for entry in self.entries
        ]
        for place, entry in enumerate(each):
            if entry in each[:place]:
                first, second = self.entries[each.index(entry)].model, self.entries[place].model
                what = f"{first!r} twice" if first == second else f"{first!r} and {second!r}, which are one folder"
                raise ValueError(f"expected each member once, found {what}: name it once, with the sum of its weights")

    def _check_named(self, what: str, names: list[str]) -> None:
        for name in names:
            if name not in self.names:
                raise ValueError(f"expected a member {what} ({', '.join(self.names)}), found {name!r}")

    @property
    def rule(self) -> str:
        """The name of the rule."""
        return next(iter(self.combine))

    @property
    def options(self) -> dict[str, Any]:
        """The rule's options."""
        return dict(self.combine[self.rule] or {})

    @property
    def entries(self) -> list[MemberSettings]:
        """The members as they are written, in order, each with all that may be said of one."""
        if isinstance(self.members, dict):
            return [MemberSettings(model=name, weight=weight) for name, weight in self.members.items()]
        return [each if isinstance(each, MemberSettings) else MemberSettings(model=each) for each in self.members]

    @property
    def names(self) -> list[str]:
        """The models it is made from, in order."""
        return list(dict.fromkeys(entry.model for entry in self.entries))

    @property
    def given(self) -> list[float] | None:
        """The weights written beside the members, one an entry."""
        found = [entry.weight for entry in self.entries if entry.weight is not None]
        return found or None
