"""A model whose weights are a base and task vectors, composed anew at every step; gradients come a parameter at a time.

What is held is one model in float32, the gradient of one parameter, and as many task vectors as HELD bytes take: the
others are read from their files each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.checkpoint import FLOATS
from graft.merge._layers import Layers, parameters_of
from graft.merge._reading import load
from graft.merge.candidates import check_parents
from graft.merge.inputs import inputs
from graft.merge.preflight import layout
from graft.merge.settings import DeltaSettings
from graft.verb import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

HELD = 1 << 30
"""Bytes of base and task vectors that are kept in memory."""


class Composed:
    """`with Composed(job, settings) as composed`: `.model` (the base at first), `.compose(make)`, `.gradients(to)`."""

    def __init__(self, job: Job, settings: DeltaSettings):
        check_parents(job)
        self.settings = settings
        plan = layout(settings, job.models)
        floats = {name: places for name, places in plan.places.items() if plan.tensors[name][0] in FLOATS}
        self.model = load(job, settings, settings.base)
        stored = {name: places[settings.base] for name, places in floats.items()}
        named = parameters_of(Layers.of(self.model), stored.values(), settings.base)
        self.places: dict[str, Mapping[str, str]] = {named[stored[name]]: places for name, places in floats.items()}
        """Parameter → parent → name of the tensor there."""
        self.outputs = {name: named[stored[name]] for name in floats}
        """Tensor of the output → parameter."""
        self._job = job
        self._opened = ExitStack()
        self._held: dict[tuple[str, str], Tensor] = {}
        self._room = HELD

    def __enter__(self) -> Composed:
        parents = inputs(self.settings, self._job.models)
        self._readers = {name: self._opened.enter_context(parent.open()) for name, parent in parents.items()}
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
        found = self._readers[model].read(self.places[parameter][model])
        return found.to(self.model.device, torch.float32)

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
        for parameter in self.places:
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
            for parameter in self.places
        ]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()
