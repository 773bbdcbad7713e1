"""What tuning does: a model from disk, its method applied, the training loop, a model folder."""

from __future__ import annotations

from typing import Any

from graft import data, lineage, models
from graft.data.objectives import objective_for, objective_rows
from graft.methods import method
from graft.train.losses import TokenLoss
from graft.tune.settings import TuneSettings
from graft.verb import Job

LONGEST = 1024
"""Tokens of context that tuning uses where nothing is said, if the model can take as many."""


def run(job: Job) -> dict[str, Any]:
    """Tune and write a model folder into `job.out`; returns the metrics of the training."""
    import torch

    from graft.train.loop import train

    settings = job.settings
    assert isinstance(settings, TuneSettings)
    start = job.models[settings.from_]
    tokenizer = models.load_tokenizer(start)
    model = models.load(start, dtype=torch.float32)
    ((name, options),) = settings.method.items()
    how = method("graft.tune", name)
    model = how.apply(model, how.Settings(**options)).train()
    name, split = data.split_ref(settings.data)
    corpus = data.open_corpus(job.data, name, job.root)
    objective = objective_for(lineage.architecture_of(model.config.to_dict()), settings.objective)
    common: dict[str, Any] = {"length": settings.length or context(model.config), "seed": job.seed, "cache": job.cache}
    torch.manual_seed(job.seed)
    result = train(
        model, objective_rows(corpus, split, tokenizer, objective, **common), TokenLoss(), settings, job.out,
        scratch=job.scratch, seed=job.seed, dev=objective_rows(corpus, "dev", tokenizer, objective, **common),
        device=job.device, save=lambda trained, folder: models.save(trained, tokenizer, folder),
    )  # fmt: skip
    models.save(model, tokenizer, job.out)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**result.metrics, "parameters": model.num_parameters(), "trained_parameters": trained}


def context(config: Any) -> int:
    """The longest context a configuration names, 1024 at most."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        longest = getattr(config, name, None)
        if isinstance(longest, int) and longest > 0:
            return min(longest, LONGEST)
    return LONGEST
