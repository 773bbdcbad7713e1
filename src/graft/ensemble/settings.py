"""What `ensemble:` may say. Light."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

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
    documents: Annotated[int, Field(gt=0, description="At most so many documents of each data set are read.")] = 200
    gate: Annotated[
        GateSettings | None,
        Field(description="Weights that follow the context: `0`, a linear gate; `16`, one with so many units."),
    ] = None


NOT_A_MIXTURE = "a union of vocabularies is for mixtures (linear), found {!r}: other rules need the same tokens"


class EnsembleSettings(Settings):
    """Members whose predictions are combined at every token."""

    combine: Annotated[
        dict[str, Any],
        Field(
            description="The rule: `linear` (a mixture of probabilities), `log_linear` (their renormalised product), "
            "`experts`, `contrastive`; with options `{experts: {alpha: 2}}`."
        ),
    ] = {"linear": {}}
    members: Annotated[
        list[ModelRef] | dict[ModelRef, float], Field(min_length=1, description="Models, or models with their weights.")
    ]
    weights: Annotated[
        Literal["uniform"] | FittedWeights | None,
        Field(description="`uniform`, or `{fit: DATA.dev}`; left out where `members` gives weights."),
    ] = None
    vocabulary: Annotated[
        Literal["same", "union"],
        Field(
            description="`same`: members of one vocabulary, others are refused; `union`: a token that only some "
            "members have gets what they give (linear)."
        ),
    ] = "same"
    draft: Annotated[
        ModelRef | None,
        Field(description="The member that drafts blocks of tokens where the ensemble speculates; best a fast one."),
    ] = None
    self_contained: Annotated[bool, Field(description="Copy the members into the ensemble's folder.")] = False

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("combine"), str):
            return {**raw, "combine": {raw["combine"]: {}}}
        return raw

    @model_validator(mode="after")
    def _one_way(self) -> EnsembleSettings:
        if isinstance(self.members, dict) and self.weights is not None:
            raise ValueError("expected weights beside the members or in `weights`, found both")
        if isinstance(self.members, list) and len(set(self.members)) < len(self.members):
            raise ValueError(f"expected each member once, found {self.members}")
        if self.draft is not None and self.draft not in self.members:
            raise ValueError(f"expected a member as draft ({', '.join(self.members)}), found {self.draft!r}")
        gate = self.weights.gate if isinstance(self.weights, FittedWeights) else None
        for name in (gate.looks_at if gate else None) or ():
            if name not in self.members:
                raise ValueError(f"expected members that the gate looks at ({', '.join(self.members)}), found {name!r}")
        return self

    @property
    def rule(self) -> str:
        """The name of the rule."""
        return next(iter(self.combine))

    @property
    def options(self) -> dict[str, Any]:
        """The rule's options."""
        return dict(self.combine[self.rule] or {})

    @property
    def names(self) -> list[str]:
        """The members, in order."""
        return list(self.members)

    @property
    def given(self) -> list[float] | None:
        """The weights written beside the members."""
        return list(self.members.values()) if isinstance(self.members, dict) else None
