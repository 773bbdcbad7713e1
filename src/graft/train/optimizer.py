"""AdamW as everybody uses it: fused, and weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from graft.errors import TrainingError
from graft.train.settings import TrainSettings


def adamw(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the parameters that require a gradient.

    Biases, norms (everything with fewer than two dimensions) and embeddings get no weight decay; a matrix tied to an
    embedding is that embedding. A parameter with an attribute `rate` learns that many times as fast. Raises
    TrainingError where every parameter is frozen.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("expected parameters to train, found all of them frozen; freeze fewer")
    groups = []
    for rate in dict.fromkeys(getattr(p, "rate", 1.0) for p in trained):
        alike = [p for p in trained if getattr(p, "rate", 1.0) == rate]
        decayed = [p for p in alike if p.ndim >= 2 and id(p) not in embeddings]
        plain = [p for p in alike if p.ndim < 2 or id(p) in embeddings]
        groups.append({"params": decayed, "weight_decay": settings.weight_decay, "rate": rate})
        groups.append({"params": plain, "weight_decay": 0.0, "rate": rate})
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in trained)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas, fused=fused
    )
