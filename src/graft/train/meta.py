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
from torch.func import functional_call

from graft.data.rows import Row, Rows
from graft.data.turns import Turns, by_task, collated, named
from graft.train.attention import Batch
from graft.train.multitask import TaskLoss

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
    Episodes may be spread over processes: each adapts weights of its own.
    """

    functional = True

    def __init__(self, how: How, loss: TaskLoss, rate: float):
        self.how, self.loss, self.rate = how, loss, rate

    def weight(self, batch: Batch) -> int:
        """Number of episodes."""
        return len(by_task(batch))

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum over the episodes."""
        episodes = by_task(batch).values()
        return torch.stack([self._episode(model, list(by_task(episode).values())) for episode in episodes]).sum()

    def _episode(self, model: nn.Module, batches: Sequence[Batch]) -> torch.Tensor:
        start = {name: p for name, p in model.named_parameters() if p.requires_grad}
        inner = batches[:-1] if self.how == "fomaml" else batches
        with torch.enable_grad():
            moved, losses = self._adapted(model, start, inner)
        if self.how == "fomaml":
            # the value of the adapted weights with the gradient of those it started from
            there = {name: p + (moved[name] - p).detach() for name, p in start.items()}
            return self._mean(model, there, batches[-1])
        pull = torch.stack([(p * (p - moved[name]).detach()).sum() for name, p in start.items()]).sum() / self.rate
        return torch.stack(losses).mean() + (pull - pull.detach())

    def _adapted(
        self, model: nn.Module, start: Mapping[str, torch.Tensor], batches: Sequence[Batch]
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """The weights after a step of gradient descent on each batch, and the losses before each."""
        moved = {name: p.detach().requires_grad_() for name, p in start.items()}
        losses = []
        for batch in batches:
            loss = self._mean(model, moved, batch)
            found = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
            steps = zip(moved.items(), found, strict=True)
            moved = {n: (p if g is None else p - self.rate * g).detach().requires_grad_() for (n, p), g in steps}
            losses.append(loss.detach())
        return moved, losses

    def _mean(self, model: nn.Module, weights: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """The loss a unit of a batch, at these weights."""
        return functional_call(model, everywhere(model, weights), (batch,), tie_weights=False) / max(
            self.loss.weight(batch), 1
        )


def everywhere(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the names of all places that hold them: every module once, tied weights in each of theirs.

    `functional_call` ties by itself, but loses weights where one module stands under several names, as a shared body.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    places = {
        f"{path}.{own}".lstrip("."): first[id(parameter)]
        for path, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None
    }
    return {place: weights[name] for place, name in places.items() if name in weights}
