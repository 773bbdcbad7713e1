"""Weights learned from gradients, and episodes: against their formulas."""

import numpy as np
import pytest
import torch
from torch import nn

from graft.data.rows import ListRows
from graft.data.turns import Turns
from graft.errors import RequestError
from graft.train.learned import LearnedWeights, followed
from graft.train.meta import EpisodeRows, MetaLoss


class Line(nn.Module):
    """Tasks pull the two weights of one line towards their targets: loss = Σ (w - target)² / 2 a row."""

    def __init__(self, targets):
        super().__init__()
        self.tasks = list(targets)
        self.base_model = nn.Module()
        self.base_model.w = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("weights", torch.ones(len(targets)))

    @property
    def root(self):
        return self

    @property
    def loss(self):
        return self

    def weight(self, batch):
        return sum(len(tensor) for tensor in batch.values())

    def task_loss(self, task, batch):
        return ((self.base_model.w - batch["target"]) ** 2).sum() / 2

    def forward(self, batch, weighted=True):
        return torch.stack([self.task_loss(None, {"target": tensor}) for tensor in batch.values()]).sum()


def rows(targets, count=12):
    make = lambda t: [{"target": np.array(t, np.float32) + 0.1 * i} for i in range(count)]  # noqa: E731
    return {name: ListRows(make(target), shuffle=False) for name, target in targets.items()}


TARGETS = {"end": [5.0, 2.0], "helps": [9.0, 3.0], "hurts": [-5.0, 1.0]}


def test_a_task_that_pulls_as_the_dev_data_do_gets_more_and_one_that_pulls_back_less():
    model = Line(TARGETS)
    learned = LearnedWeights(model, rows(TARGETS), rows(TARGETS), ["end"], every=2, rate=0.5, rows=3)
    before = model.weights.clone()
    learned(1)
    assert torch.equal(model.weights, before)
    learned(2)
    w = model.base_model.w.detach().double()
    step = {n: torch.stack([w - torch.tensor(t, dtype=torch.double) - 0.1 * i for i in (3, 4, 5)]).mean(0)
            for n, t in TARGETS.items()}  # fmt: skip
    cosine = torch.stack([torch.cosine_similarity(step[n], step["end"], dim=0) for n in TARGETS])
    share = torch.ones(3) / 3
    expected = 3 * torch.softmax(share.log() + 0.5 * (cosine - share * cosine.sum()), 0)
    torch.testing.assert_close(model.weights.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert model.weights[1] > 1 > model.weights[2]
    assert model.base_model.w.grad is None
    assert model.training


def test_the_step_of_the_weights_is_the_gradient_of_the_expected_log_share():
    weights = torch.tensor([0.5, 1.5, 1.0], dtype=torch.double)
    rewards = torch.tensor([0.3, -0.2, 0.9], dtype=torch.double)
    logits = (weights / 3).log().requires_grad_()
    (rewards * logits.log_softmax(0)).sum().backward()
    expected = 3 * torch.softmax(logits.detach() + 0.1 * logits.grad, 0)
    torch.testing.assert_close(followed(weights, rewards, 0.1), expected)
    torch.testing.assert_close(followed(weights, torch.zeros(3, dtype=torch.double), 0.1), weights)


def test_a_task_without_dev_data_is_refused_in_a_learned_mixture():
    given = {"every": 1, "rate": 1.0, "rows": 1}
    dev = {"helps": rows(TARGETS)["helps"]}
    with pytest.raises(RequestError, match=r"dev data for the task end.*give its data a dev split"):
        LearnedWeights(Line(TARGETS), rows(TARGETS), dev, ["end"], **given)
    frozen = Line(TARGETS)
    frozen.base_model.w.requires_grad_(False)
    with pytest.raises(RequestError, match="all of them frozen"):
        LearnedWeights(frozen, rows(TARGETS), rows(TARGETS), ["end"], **given)


def episodes(batches, size=2, count=3):
    made = EpisodeRows(rows(TARGETS, 40), Turns([(1, [1.0, 1.0, 1.0])]), batches, size)
    return made, made.collate([made[i] for i in range(count)])


def adapted(model, targets, rate):
    """φ after a step on each batch of targets, by hand; and the mean loss on the way."""
    w, losses = model.base_model.w.detach().clone(), []
    for batch in targets:
        losses.append(((w - batch) ** 2).sum() / 2 / len(batch))
        w = w - rate * (w - batch).mean(0)
    return w, torch.stack(losses).mean()


@pytest.mark.parametrize("how", ["fomaml", "reptile"])
def test_the_gradient_of_an_episode_is_that_of_the_method(how):
    model, rate = Line(TARGETS), 0.1
    _, batch = episodes(4)
    objective = MetaLoss(how, model, rate)
    assert objective.weight(batch) == 3
    value = objective(model, batch)
    value.backward()
    gradient, total = torch.zeros(2), torch.zeros(())
    for number, task in enumerate(TARGETS):
        targets = [batch[f"{number}/{step}/{task}/target"] for step in range(4)]
        if how == "fomaml":
            w, _ = adapted(model, targets[:3], rate)
            gradient += (w - targets[3]).mean(0)
            total += ((w - targets[3]) ** 2).sum() / 2 / 2
        else:
            w, loss = adapted(model, targets, rate)
            gradient += (model.base_model.w.detach() - w) / rate
            total += loss
    torch.testing.assert_close(model.base_model.w.grad, gradient, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value.detach(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["fomaml", "reptile"])
def test_episodes_in_pieces_are_episodes_at_once_and_are_measured_without_gradients(how):
    model, (made, batch) = Line(TARGETS), episodes(2)
    objective = MetaLoss(how, model, 0.1)
    parts = [objective(model, made.collate([made[i]])) for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(), objective(model, batch))
    with torch.no_grad():
        torch.testing.assert_close(objective(model, batch), torch.stack(parts).sum().detach())


def test_no_row_is_read_in_two_episodes_of_an_epoch():
    made = EpisodeRows(rows({"a": [0.0, 0.0]}, 12), Turns([(1, [1.0])]), 2, 3)
    assert len(made) == 2
    seen = [float(row[0]) for i in range(2) for row in made[i].values()]
    assert len(set(seen)) == 12


class Shared(nn.Module):
    """One body under two names, and a weight tied to one of the body's: loss = Σ over both of (w · x)."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = self.a
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.a.weight

    def forward(self, batch):
        return sum((layer(batch["t/x"]) ** 2).sum() for layer in (self.a, self.b, self.tied))


class Ones:
    def weight(self, batch):
        return 1


def test_a_shared_body_and_tied_weights_are_adapted_as_one_and_left_as_they_were():
    model, x = Shared(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    before = model.a.weight
    value = before.detach().clone()
    loss = MetaLoss("fomaml", Ones(), 0.01)
    loss(model, {"0/0/t/x": x, "0/1/t/x": x}).backward()
    assert model.a.weight is model.b.weight is model.tied.weight is before
    assert torch.equal(before, value)
    gradient = lambda w: 6 * w @ x.T @ x  # noqa: E731
    torch.testing.assert_close(before.grad, gradient(value - 0.01 * gradient(value)))


def half(weight, x):
    """Loss and gradient of `Shared` with this weight under autocast."""
    model = Shared()
    model.a.weight.data.copy_(weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model({"t/x": x})
    loss.backward()
    return loss.detach(), model.a.weight.grad


def test_steps_in_half_precision_read_the_weights_that_were_moved():
    """Casts of weights are kept while autocast lasts."""
    model, x = Shared(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    start = model.a.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        value = MetaLoss("fomaml", Ones(), 0.05)(model, {"0/0/t/x": x, "0/1/t/x": x})
    value.backward()
    _, first = half(start, x)
    expected, gradient = half(start - 0.05 * first, x)
    assert torch.equal(value, expected)
    assert torch.equal(model.a.weight.grad, gradient)


def test_first_order_maml_finds_a_start_from_which_both_tasks_are_near():
    targets = {"left": [-4.0, 0.0], "right": [4.0, 0.0]}
    model = Line(targets)
    made = EpisodeRows(rows(targets, 40), Turns([(1, [1.0, 1.0])]), 2, 2)
    objective, optimizer = MetaLoss("fomaml", model, 0.3), torch.optim.SGD(model.parameters(), 0.2)
    for step in range(60):
        optimizer.zero_grad()
        (objective(model, made.collate([made[2 * step], made[2 * step + 1]])) / 2).backward()
        optimizer.step()
    middle = torch.tensor([2.0, 2.0])  # rows move by 0.1 each, from 0 to 3.9, in both coordinates
    assert (model.base_model.w.detach() - middle).abs().max() < 1.5
