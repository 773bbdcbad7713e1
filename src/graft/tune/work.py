"""What tuning does: a model from disk, its method applied, the training loop, a model folder."""

from __future__ import annotations

from typing import Any

from graft import data, lineage, models
from graft.data.objectives import objective_for
from graft.methods import method
from graft.tune.settings import TuneSettings
from graft.verb import Job

LONGEST = 1024
"""Tokens of context that tuning uses where nothing is said, if the model can take as many."""


def run(job: Job) -> dict[str, Any]:
    """Tune and write a model folder into `job.out`; returns the metrics of the training."""
    import torch

    from graft.train.on_text import train_on_text

    settings = job.settings
    assert isinstance(settings, TuneSettings)
    start = job.models[settings.from_]
    name, split = data.split_ref(settings.data)
    corpus = data.open_corpus(job.data, name, job.root)
    torch.manual_seed(job.seed)
    model = models.load(start, dtype=torch.float32)
    ((how, options),) = settings.method.items()
    chosen = method("graft.tune", how)
    model = chosen.apply(model, chosen.Settings(**options))
    objective = objective_for(lineage.architecture_of(model.config.to_dict()), settings.objective)
    tokenizer = models.load_tokenizer(start)
    length = settings.length or context(model.config, tokenizer)
    metrics = train_on_text(job, model, tokenizer, corpus, split, objective, length)
    return {**metrics, "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def context(config: Any, tokenizer: Any) -> int:
    """The longest context that the configuration and the tokenizer name, 1024 at most."""
    named = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    named.append(tokenizer.model_max_length)
    return min([LONGEST, *(longest for longest in named if isinstance(longest, int) and longest > 0)])
