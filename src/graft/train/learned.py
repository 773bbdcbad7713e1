"""Weights of tasks, learned while training: by how alike their gradients are to that on the end tasks' dev data.

The weights are K · softmax(ψ) for K tasks. Now and then each task's gradient g_k and the gradient d on the dev data are
taken, both on the shared body; r_k = cos(g_k, d) is the reward, and ψ_k ← ψ_k + rate · (r_k - P_k · Σ r) with
P = softmax(ψ), the gradient of Σ_k r_k log P_k (Wang, Tsvetkov & Neubig 2020, arXiv:2004.06748, algorithm 1). There P
says how often a task is drawn; here it weighs the losses, so that the rows of a step follow from its number alone and a
killed training goes on exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from graft.data.rows import Rows
from graft.data.turns import named
from graft.errors import RequestError
from graft.train.gradients import Gradient, added, dot, loss_and_gradient
from graft.train.multitask import MultiTask
from graft.train.settings import no_dev
from graft.train.shards import summed


class LearnedWeights:
    """`weights(step)`, called before each step, brings `model.weights` up to date. Frozen parameters are left out.

    `parts` and `dev` are rows by task; `ends`: the tasks whose dev loss is to fall. Raises RequestError where one of
    them has no dev rows, or nothing that the tasks share is trained.
    """

    def __init__(
        self,
        model: MultiTask,
        parts: Mapping[str, Rows],
        dev: Mapping[str, Rows],
        ends: Sequence[str],
        *,
        every: int,
        rate: float,
        rows: int,
    ):
        if lost := [name for name in ends if name not in dev]:
            raise RequestError(no_dev(lost[0]))
        self.model, self.parts, self.dev, self.ends = model, parts, dev, list(ends)
        self.every, self.rate, self.rows = every, rate, rows
        if not shared_parameters(model):
            raise RequestError(
                "expected weights that the tasks share to be trained, found all of them frozen: gradients on a frozen "
                "body tell nothing of the tasks; unfreeze some, or leave `mixing.learn` out"
            )

    def __call__(self, step: int) -> None:
        """Compare and follow, where it is time. The same step on the same weights always gives the same."""
        if step % self.every:
            return
        number, training = step // self.every, self.model.training
        shared = shared_parameters(self.model)
        self.model.eval()
        try:
            rewards = self._rewards(number, shared)
        finally:
            self.model.train(training)
        self.model.weights.copy_(followed(self.model.weights, rewards, self.rate))

    def _rewards(self, number: int, shared: list[nn.Parameter]) -> torch.Tensor:
        """[tasks] cosine of each task's gradient with the mean of those on the dev data of the end tasks."""
        wanted: Gradient = [None] * len(shared)
        for name in self.ends:  # a mean has the direction of the sum
            wanted = added(wanted, self._gradient(name, self.dev[name], number, shared))
        products = [dot(wanted, wanted, shared)]
        for name in self.model.tasks:
            own = self._gradient(name, self.parts[name], number, shared)
            products += [dot(own, wanted, shared), dot(own, own, shared)]
        found = summed(products, shared).to(self.model.weights.device)
        lengths = found[2::2].sqrt() * found[0].sqrt()
        return found[1::2] / lengths.clamp(min=1e-12)

    def _gradient(self, task: str, part: Rows, number: int, shared: list[nn.Parameter]) -> Gradient:
        """That of the loss a unit on the next few rows of a task."""
        rows = [part[index] for index in range(number * self.rows, (number + 1) * self.rows)]
        device = self.model.weights.device
        batch = named(task, {name: tensor.to(device) for name, tensor in part.collate(rows).items()})
        return loss_and_gradient(self.model, batch, self.model.loss.weight(batch), shared, weighted=False)[1]


def shared_parameters(model: MultiTask) -> list[nn.Parameter]:
    """What of the body, and of adapters in it, is trained."""
    body = {id(p) for p in model.root.base_model.parameters()}
    return [
        p
        for name, p in model.root.named_parameters()
        if p.requires_grad and (id(p) in body or "graft_adapters" in name)
    ]


def followed(weights: torch.Tensor, rewards: torch.Tensor, rate: float) -> torch.Tensor:
    """New weights [tasks], mean 1, from the old ones and the rewards [tasks]: one step up the expected reward."""
    share = weights / weights.sum()
    return torch.softmax(share.log() + rate * (rewards - share * rewards.sum()), 0) * len(weights)
