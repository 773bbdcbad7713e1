"""Full fine-tuning: all weights, or those that name patterns leave free."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from graft.errors import RequestError, nearest
from graft.settings import Settings as Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Settings(Base):
    """All weights are trained, apart from those that `freeze` names or `only` leaves out."""

    freeze: Annotated[
        list[str], Field(description="Patterns of parameter names that stay as they are, such as `*.embed_tokens.*`.")
    ] = []
    only: Annotated[list[str], Field(description="Patterns of parameter names that are trained; empty: all.")] = []


def problems(names: Collection[str], freeze: Iterable[str], only: Iterable[str]) -> list[str]:
    """What is wrong with the patterns for parameters of these names, a sentence each; nothing is known of none."""
    idle = [pattern for pattern in [*freeze, *only] if names and not fnmatch.filter(names, pattern)]
    hints = [nearest(p.strip("*."), names) or f"; names look like {', '.join(list(names)[:4])}" for p in idle]
    found = [
        f"expected a pattern that matches parameters, found {pattern!r}, which matches none{hint}"
        for pattern, hint in zip(idle, hints, strict=True)
    ]
    if names and not found and not _kept(names, freeze, only):
        found.append("expected some parameters to train, found that the patterns freeze all of them")
    return found


def trained_names(names: Iterable[str], freeze: Iterable[str], only: Iterable[str]) -> list[str]:
    """Names that are trained. Raises RequestError for a pattern that matches nothing, or if nothing is left."""
    names = list(names)
    if wrong := problems(names, freeze, only):
        raise RequestError("\n".join(wrong))
    return _kept(names, freeze, only)


def _kept(names: Iterable[str], freeze: Iterable[str], only: Iterable[str]) -> list[str]:
    kept = [n for n in names if not only or any(fnmatch.fnmatchcase(n, p) for p in only)]
    return [n for n in kept if not any(fnmatch.fnmatchcase(n, p) for p in freeze)]


def apply(model: PreTrainedModel, settings: Settings) -> PreTrainedModel:
    """The model with `requires_grad` set; frozen weights have no gradient and no optimizer state."""
    kept = set(trained_names([name for name, _ in model.named_parameters()], settings.freeze, settings.only))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    return model
