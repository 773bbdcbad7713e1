"""A model whose weights are a base and task vectors, composed anew at every step; gradients come a parameter at a time.

What is held is one model in float32, the gradient of one parameter, and as many task vectors as HELD bytes take: the
others are read from their files each time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.merge._parameters import Parameters
from graft.merge.settings import DeltaSettings
from graft.merge.stream import Source
from graft.verb import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

HELD = 1 << 30
"""Bytes of base and task vectors that are kept in memory."""


class Composed:
    """`with Composed(job, settings) as composed`: `.model` (the base at first), `.compose(make)`, `.gradients(to)`."""

    def __init__(self, job: Job, settings: DeltaSettings):
        self.settings = settings
        self._opened = ExitStack()
        with ExitStack() as opened:
            self._parameters = Parameters(job, settings, opened)
            self._opened = opened.pop_all()
        self.model, self.layers = self._parameters.model, self._parameters.layers
        self.names = list(self._parameters.stored)
        """The parameters."""
        self.outputs = self._parameters.outputs
        """Tensor of the output → the parameter that it is (a part of)."""
        self._held: dict[tuple[str, str], Tensor] = {}
        self._room = HELD

    def __enter__(self) -> Composed:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        self._held.clear()

    def base(self, parameter: str) -> Tensor:
        """A parameter of the base, in its shape, float32. Not to be changed."""
        return self._kept(parameter, self.settings.base, lambda: self._read(parameter, self.settings.base))

    def delta(self, parameter: str, model: str) -> Tensor:
        """A parameter's task vector of one model, in its shape, float32. Not to be changed."""
        return self._kept(parameter, model, lambda: self._read(parameter, model) - self.base(parameter))

    def _read(self, parameter: str, model: str) -> Tensor:
        return self._parameters.read(parameter, model).to(self.model.device)

    def source(self, parameter: str, model: str) -> Source:
        """Where a parameter of one parent lies."""
        return Source(model, *self._parameters.source(parameter, model))

    def _kept(self, parameter: str, model: str, make: Callable[[], Tensor]) -> Tensor:
        key = (parameter, model)
        if key not in self._held:
            made = make()
            size = made.numel() * made.element_size()
            if size > self._room:
                return made
            self._room -= size
            self._held[key] = made
        return self._held[key]

    @torch.no_grad()
    def compose(self, change: Callable[[str], Tensor]) -> None:
        """Set every parameter to the base plus `change(parameter)`."""
        for parameter in self.names:
            torch.add(self.base(parameter), change(parameter), out=self.model.get_parameter(parameter).data)

    @contextmanager
    def gradients(self, to: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, every backward pass hands each parameter's gradient to `to(parameter, gradient)` and forgets it."""

        def hook(parameter: str) -> Callable[[Tensor], None]:
            def hand_over(weight: Any) -> None:
                to(parameter, weight.grad)
                weight.grad = None

            return hand_over

        hooks = [
            self.model.get_parameter(parameter).register_post_accumulate_grad_hook(hook(parameter))
            for parameter in self.names
        ]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()
