"""What learns: trained weights as this place holds them, their optimizer, their average; and all of it as a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from graft.adapters.companion import Companion
from graft.train.companions import add_gradient
from graft.train.ema import MovingAverage
from graft.train.optimizer import adamw
from graft.train.place import Place
from graft.train.settings import TrainSettings
from graft.train.shards import fill


class Learner:
    """A model with all that changes in a training. `wrapped` is what is called; gradients then become a mean."""

    def __init__(self, model: nn.Module, settings: TrainSettings, place: Place, companions: Sequence[Companion] = ()):
        self.companions = companions
        self.model, self.place, self.clip = model, place, settings.clip
        self.wrapped = place.wrap(model, settings)
        self.parts = place.parts(model)
        self.optimizer = adamw(model, settings, self.parts.of)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=settings.precision == "fp16")
        self.average = MovingAverage(model, settings.ema) if settings.ema else None
        self.shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
        # weights, two moments and the average
        self.bytes = sum(p.nbytes for p in self.parts.parameters) * (3 if self.average is None else 4)

    def set_rate(self, learning_rate: float) -> None:
        """The learning rate of the steps to come, each parameter's times its own."""
        engine = self.place.engine
        for group in engine.groups if engine else self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]

    def backward(self, loss: torch.Tensor) -> None:
        """The gradients of a piece of a step."""
        if self.place.engine is None:
            self.scaler.scale(loss).backward()
        else:
            self.place.engine.backward(loss)

    def update(self, step: int) -> torch.Tensor:
        """Clip and step behind the backward passes of step 1, 2, …; the norm of the gradient before clipping."""
        if self.place.engine is not None:
            return self.place.engine.norm()
        self.parts.take_gradients()
        self.scaler.unscale_(self.optimizer)
        for companion in self.companions:
            add_gradient(companion.penalty(), self.parts.parameters)
        norm = self.parts.norm()
        if self.clip is not None:
            self.parts.clip(self.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for companion in self.companions:
            companion.stepped(step)
        self.parts.drop_gradients()
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that changes, by name: trained weights, buffers, moments, average; whole or in parts.

        Every process must ask.
        """
        engine = self.place.engine
        found = self._places()
        if engine is not None:
            found |= {f"model.{name}": tensor for name, tensor in engine.weights().items()}
        moments = engine.moments() if engine else self.parts.moments(self.optimizer)
        return found | {f"optimizer.{name}": tensor for name, tensor in moments.items()}

    def _places(self) -> dict[str, torch.Tensor]:
        """Trained weights, buffers and average, where they lie."""
        found: dict[str, torch.Tensor] = {
            f"model.{name}": p for name, p in self.model.named_parameters() if p.requires_grad
        }
        found.update({f"buffer.{name}": b for name, b in self.model.named_buffers()})
        if self.average is not None:
            found.update({f"average.{name}": tensor for name, tensor in self.average.tensors().items()})
        return found

    def begin(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Start to learn: from what `tensors` gave, whole, if there is such a state."""
        held = {name.partition(".")[2]: t for name, t in (tensors or {}).items() if name.startswith("optimizer.")}
        if tensors is not None:
            for name, target in self._places().items():
                fill(target, tensors[name])
        if self.place.engine is not None:
            self.wrapped = self.place.engine.begin(self.optimizer, held)
        elif tensors is not None:
            self.parts.set_moments(self.optimizer, held)
