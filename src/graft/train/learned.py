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

from graft.data.rows import Rows
from graft.data.turns import named
from graft.errors import RequestError
from graft.train.multitask import MultiTask
from graft.train.settings import no_dev


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
        self.shared = shared_parameters(model)
        if not self.shared:
            raise RequestError(
                "expected weights that the tasks share to be trained, found all of them frozen: gradients on a frozen "
                "body tell nothing of the tasks; unfreeze some, or leave `mixing.learn` out"
            )

    def __call__(self, step: int) -> None:
        """Compare and follow, where it is time. The same step on the same weights always gives the same."""
        if step % self.every:
            return
        number, training = step // self.every, self.model.training
        self.model.eval()
        try:
            wanted = torch.stack([self._gradient(name, self.dev[name], number) for name in self.ends]).mean(0)
            found = [self._gradient(name, self.parts[name], number) for name in self.model.tasks]
        finally:
            self.model.train(training)
        rewards = torch.stack([torch.cosine_similarity(each, wanted, dim=0) for each in found])
        self.model.weights.copy_(followed(self.model.weights, rewards, self.rate))

    def _gradient(self, task: str, part: Rows, number: int) -> torch.Tensor:
        """[numbers in the shared parameters] gradient of the loss a unit on the next few rows of a task."""
        rows = [part[index] for index in range(number * self.rows, (number + 1) * self.rows)]
        device = self.model.weights.device
        batch = {name: tensor.to(device) for name, tensor in part.collate(rows).items()}
        loss = self.model.task_loss(task, batch) / max(self.model.loss.weight(named(task, batch)), 1)
        found = torch.autograd.grad(loss, self.shared, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(self.shared, found, strict=True)]
        return torch.cat([each.flatten().float() for each in flat])


def shared_parameters(model: MultiTask) -> list[torch.nn.Parameter]:
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
