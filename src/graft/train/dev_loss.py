"""The loss on rows that nothing is learned from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graft.data.rows import Rows
from graft.errors import TrainingError
from graft.train.batches import Ahead
from graft.train.place import Place
from graft.train.settings import TrainSettings
from graft.train.shards import settle


@torch.no_grad()
def dev_loss(model: nn.Module, dev: Rows, most: int, objective: Any, settings: TrainSettings, place: Place) -> float:
    """Loss a unit over the first rows of `dev`, `most` at most, each read once by one of the processes.

    Every process reads as many batches, since weights in parts are put together by all; some the first once more,
    which does not count. Raises TrainingError where all labels are masked.
    """
    size = settings.batch_size // (settings.accumulate * place.shares)
    count = min(len(dev), most)
    own = range(place.share * size, count, size * place.shares)
    batches = len(range(0, count, size * place.shares))
    starts = [*own, *[0] * (batches - len(own))]
    plans = ([range(start, min(start + size, count))] for start in starts)
    total, weight = torch.zeros((), dtype=torch.float64, device=place.device), 0.0
    model.eval()
    with Ahead(dev, plans, objective, place.device.type == "cuda") as steps:
        for number, step in enumerate(steps):
            with place.autocast(settings.precision):
                found = objective(model, place.take(step.pieces[0]))
            if number < len(own):
                total += found
                weight += step.weight
    model.train()
    settle(model)
    loss, units = place.total([float(total), weight])
    if units == 0:
        raise TrainingError("expected dev rows with labels, found all of them masked; look at the dev split's format")
    return loss / units
