"""LoRA: a low-rank change beside single linear layers (Hu et al. 2021, arXiv:2106.09685), and its refinements."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from graft.adapters.point import EXPERTS, SUBLAYERS, Layers, Point
from graft.settings import Settings as Base


class Settings(Base):
    """h + s·B A x beside each chosen linear layer, with s = alpha / rank. Folds into the weights."""

    rank: Annotated[int, Field(ge=1, description="Rank of the change.")] = 8
    alpha: Annotated[float, Field(gt=0, description="The change is multiplied by alpha / rank.")] = 16.0
    on: Annotated[
        list[str],
        Field(
            min_length=1,
            description="Linear layers: `linears` (all in the blocks), `attention`, `feed_forward`, `query`, `value`, "
            "… or patterns of names such as `*.q_proj`. Experts that lie in one parameter: `experts`, `experts_up`, "
            "`experts_down`.",
        ),
    ] = ["linears"]
    layers: Layers = None
    dropout: Annotated[float, Field(ge=0, lt=1, description="Share of x that is dropped in training.")] = 0.0
    rslora: Annotated[
        bool, Field(description="Multiply by alpha / √rank, which high ranks need (Kalajdzievski 2023).")
    ] = False
    dora: Annotated[
        bool, Field(description="Train the length of each row of the weight beside its direction (Liu et al. 2024).")
    ] = False
    pissa: Annotated[
        bool, Field(description="Start from the largest singular values of the weight (Meng et al. 2024).")
    ] = False
    up_rate: Annotated[
        float, Field(gt=0, description="Learning rate of B as a multiple of A's; LoRA+ uses 16 (Hayou et al. 2024).")
    ] = 1.0

    @model_validator(mode="after")
    def _plain_at_experts(self) -> Settings:
        refined = [name for name in ("dora", "pissa") if getattr(self, name)]
        if refined and any(word in EXPERTS for place in self.on for word in place.split("|")):
            raise ValueError(
                f"fused experts take plain LoRA, found {refined[0]}: leave it out, or train other places (`on`)"
            )
        return self


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    divisor = math.sqrt(settings.rank) if settings.rslora else settings.rank
    return [
        Point(
            form="linear",
            insertion="parallel",
            on=[f"{word}_linears" if word in SUBLAYERS else word for word in settings.on],
            layers=settings.layers,
            composition="scaled",
            scale=settings.alpha / divisor,
            size=settings.rank,
            dropout=settings.dropout,
            directions=settings.dora,
            start="pissa" if settings.pissa else "zero",
            up_rate=settings.up_rate,
        )
    ]
