"""Going on: the adapters that the model has already are trained further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from graft.errors import RequestError, UnknownName
from graft.settings import Settings as Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Settings(Base):
    """The adapters of the model that it starts from are trained on; none is added."""

    adapters: Annotated[list[str], Field(description="Which of them; none named: all that are active.")] = []


def apply(model: PreTrainedModel, settings: Settings) -> PreTrainedModel:
    """The model with `requires_grad` set on its adapters. Raises RequestError where it has none,
    or AdaLoRA."""
    from graft.adapters.foreign import train_foreign
    from graft.adapters.stack import adapters_of

    stack = adapters_of(model)
    if stack is None and train_foreign(model):
        return model
    if stack is None:
        raise RequestError("expected a model with adapters to train further, found none: choose a method such as lora")
    model.requires_grad_(False)
    for name in settings.adapters or [name for name, _ in stack.active]:
        if name not in stack.points:
            raise UnknownName("adapter", name, list(stack.points))
        for one in (name, *stack.experts_trained_with(name)):
            stack.sites[one].requires_grad_(True)
    return model
