"""Prefix tuning: learned keys and values in front of attention (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graft.adapters.point import Point
from graft.tune._points import Keys, keys


class Settings(Keys):
    """Attention sees so many learned keys, with learned values, before the text, in every block."""

    cross: Annotated[bool, Field(description="In front of cross-attention as well.")] = False


def points(settings: Settings) -> list[Point]:
    """The point of the design space that these settings name."""
    return [keys(settings, ["attention", "cross_attention"] if settings.cross else ["attention"])]
