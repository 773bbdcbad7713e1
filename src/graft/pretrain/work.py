"""What pretraining does: tokenizer, configuration, fresh weights, the training loop, a model folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft import data, models
from graft.checkpoint import atomic_folder
from graft.data.objectives import Span, objective_for, objective_rows
from graft.pretrain.architectures import Shape, build, config_for, dimensions, positions_for
from graft.pretrain.settings import NewTokenizer, PretrainSettings
from graft.train.losses import TokenLoss
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


def run(job: Job) -> dict[str, Any]:
    """Train and write a model folder into `job.out`; returns the metrics of the training."""
    import torch

    from graft.train.loop import train

    settings = job.settings
    assert isinstance(settings, PretrainSettings)
    corpus = data.open_corpus(job.data, data.split_ref(settings.data)[0], job.root)
    objective = objective_for(settings.architecture, settings.objective)
    tokenizer = find_tokenizer(settings, job, corpus, sentinels=isinstance(objective, Span))
    torch.manual_seed(job.seed)
    model = build(model_config(settings, tokenizer))
    common: dict[str, Any] = {"length": settings.length, "seed": job.seed, "cache": job.cache}
    rows = objective_rows(corpus, data.split_ref(settings.data)[1], tokenizer, objective, **common)
    dev = objective_rows(corpus, "dev", tokenizer, objective, **common)
    result = train(
        model, rows, TokenLoss(), settings, job.out, scratch=job.scratch, seed=job.seed, dev=dev, device=job.device,
        save=lambda trained, folder: models.save(trained, tokenizer, folder),
    )  # fmt: skip
    models.save(model, tokenizer, job.out)
    return {**result.metrics, "parameters": model.num_parameters()}


def model_config(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The configuration that the settings and the tokenizer give."""
    positions = positions_for(settings.architecture, settings.positions)
    vocabulary = len(tokenizer)
    if settings.size is not None:
        hidden, layers, heads = dimensions(settings.size, settings.architecture, positions, vocabulary, settings.length)
    else:
        assert settings.hidden
        assert settings.layers
        hidden, layers = settings.hidden, settings.layers
        heads = settings.heads or max(1, hidden // (32 if hidden < 512 else 64))
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }
    shape = Shape(hidden, layers, heads, vocabulary, settings.length, settings.dropout, ids)
    return config_for(settings.architecture, positions, shape)


def find_tokenizer(
    settings: PretrainSettings, job: Job, corpus: data.AnyCorpus, *, sentinels: bool
) -> PreTrainedTokenizerFast:
    """The tokenizer of another model, or one trained on the corpus (once: it stays in the cache)."""
    from graft.data.tokenizers import train_tokenizer

    wanted = settings.tokenizer
    if not isinstance(wanted, NewTokenizer):
        return models.load_tokenizer(job.models[wanted.of])
    name = json.dumps([corpus.fingerprint, wanted.plain(), sentinels, settings.length])
    folder = Path(job.cache) / "tokenizers" / hashlib.sha256(name.encode()).hexdigest()[:32]
    if not folder.exists():
        with atomic_folder(folder, keep_existing=True) as part:
            made = train_tokenizer(corpus, wanted.algorithm, wanted.size, sentinels=sentinels)
            made.model_max_length = settings.length
            made.save_pretrained(part)
    return models.load_tokenizer(folder)
