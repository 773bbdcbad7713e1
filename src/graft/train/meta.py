"""Meta-learning of the first order: weights from which a few steps on one task lead far.

Every row is an episode: a few steps of gradient descent on one task, from θ to φ. First-order MAML (Finn, Abbeel &
Levine 2017, arXiv:1703.03400, section 5.2) takes the gradient of the loss on further rows at φ as that at θ; Reptile
(Nichol, Achiam & Schulman 2018, arXiv:1803.02999, section 2) takes (θ - φ) / rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from graft.data.rows import Row, Rows
from graft.data.turns import Turns, by_task, collated, named
from graft.train.attention import Batch
from graft.train.gradients import Gradient, added, descend, loss_and_gradient, mean_loss, put_back, with_gradient
from graft.train.multitask import TaskLoss
from graft.train.shards import local

How = Literal["fomaml", "reptile"]


class EpisodeRows:
    """Episodes: `batches` batches of `size` rows, all of one task, in the order of `turns`; names are
    `EPISODE/BATCH/TASK/NAME`."""

    def __init__(self, parts: Mapping[str, Rows], turns: Turns, batches: int, size: int):
        self.parts, self.turns, self.batches, self.size = dict(parts), turns, batches, size
        self.names = list(parts)

    def __len__(self) -> int:
        return max(1, sum(map(len, self.parts.values())) // (self.batches * self.size))

    def __getitem__(self, index: int) -> Row:
        task, number = self.turns(index)
        name, first = self.names[task], number * self.batches * self.size
        rows = [self.parts[name][first + place] for place in range(self.batches * self.size)]
        return {f"{place}/{name}/{own}": array for place, row in enumerate(rows) for own, array in row.items()}

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        for number, episode in enumerate(rows):
            flat = list(by_task(episode).values())
            for step in range(self.batches):
                own = collated(self.parts, flat[step * self.size : (step + 1) * self.size])
                batch.update(named(f"{number}/{step}", own))
        return batch


class MetaLoss:
    """The objective: episodes are its units. Its gradient is that of the method; its value, the loss it is named for.

    fomaml: the loss behind the steps, on the episode's last batch. reptile: the mean loss on the way. Both a unit.
    The steps move the weights in place, and back. Where each process holds them all, episodes may be spread over the
    processes; where they lie in parts, all walk through the same episodes, each with rows of its own.
    """

    moves = True

    def __init__(self, how: How, loss: TaskLoss, rate: float):
        self.how, self.loss, self.rate = how, loss, rate

    def weight(self, batch: Batch) -> int:
        """Number of episodes."""
        return len(by_task(batch))

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum over the episodes. `model` may be wrapped (DeepSpeed), which is for the training's own passes."""
        model = getattr(model, "module", model)
        trained = [p for p in model.parameters() if p.requires_grad]
        along: Gradient = [None] * len(trained)
        values = []
        for episode in by_task(batch).values():
            value, pull = self._episode(model, trained, list(by_task(episode).values()))
            along = added(along, pull)
            values.append(value)
        return with_gradient(torch.stack(values).sum(), along, trained)

    def _episode(
        self, model: nn.Module, trained: list[nn.Parameter], batches: Sequence[Batch]
    ) -> tuple[torch.Tensor, Gradient]:
        """Its value and gradient; this where gradients are wanted alone."""
        behind = self.how == "fomaml"
        with put_back(trained, model) as start:
            losses = [self._step(model, trained, batch) for batch in (batches[:-1] if behind else batches)]
            if behind:
                return self._behind(model, trained, batches[-1])
            ways = zip(start, trained, strict=True)
            return torch.stack(losses).mean(), [(before - local(p).detach()) / self.rate for before, p in ways]

    def _step(self, model: nn.Module, trained: list[nn.Parameter], batch: Batch) -> torch.Tensor:
        """A step of gradient descent on a batch; the loss before it."""
        loss, along = loss_and_gradient(model, batch, self.loss.weight(batch), trained)
        descend(trained, along, self.rate)
        return loss

    def _behind(self, model: nn.Module, trained: list[nn.Parameter], batch: Batch) -> tuple[torch.Tensor, Gradient]:
        weight = self.loss.weight(batch)
        if torch.is_grad_enabled():
            return loss_and_gradient(model, batch, weight, trained)
        return mean_loss(model, batch, weight), [None] * len(trained)
