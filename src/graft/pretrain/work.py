"""What pretraining does: tokenizer, configuration, fresh weights, the training loop, a model folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft import data, models
from graft.data.objectives import Span, objective_for
from graft.data.tokenizers import put_ends
from graft.disk import atomic_folder
from graft.pretrain.architectures import Shape, build, config_for, positions_for, shape_of
from graft.pretrain.settings import PretrainSettings, TokenizerAt, TokenizerOf
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


def run(job: Job) -> dict[str, Any]:
    """Train and write a model folder into `job.out`; returns the metrics of the training."""
    import torch

    from graft.train.on_text import train_on_text
    from graft.train.optimizer import check_optimizer
    from graft.train.place import main_first, tell

    settings = job.settings
    assert isinstance(settings, PretrainSettings)
    check_optimizer(settings.optimizer, job.device)
    name, split = data.split_ref(settings.data)
    corpus = data.open_corpus(job.data, name, job.root)
    objective = objective_for(settings.architecture, settings.objective)
    with main_first():
        tokenizer = find_tokenizer(settings, job, corpus, sentinels=isinstance(objective, Span))
    put_ends(tokenizer, settings.architecture)
    torch.manual_seed(job.seed)
    tell(job, "building the model")
    model = build(model_config(settings, tokenizer))
    return train_on_text(job, model, tokenizer, corpus, split, objective, settings.length)


def model_config(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The configuration that the settings and the tokenizer give."""
    positions = positions_for(settings.architecture, settings.positions)
    vocabulary = len(tokenizer)
    hidden, layers, heads = shape_of(settings, vocabulary)
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
    """The tokenizer of another model or of a folder, or one trained on the corpus (once: it stays in the cache)."""
    from graft.data.tokenizers import train_tokenizer
    from graft.train.place import tell

    wanted = settings.tokenizer
    if isinstance(wanted, TokenizerOf):
        return models.load_tokenizer(job.models[wanted.of])
    if isinstance(wanted, TokenizerAt):
        return models.load_tokenizer(Path(job.root) / wanted.path)
    name = json.dumps([corpus.fingerprint, wanted.plain(), sentinels, settings.length])
    folder = Path(job.cache) / "tokenizers" / hashlib.sha256(name.encode()).hexdigest()[:32]
    if not folder.exists():
        tell(job, f"a tokenizer of {wanted.size:,} tokens ({wanted.algorithm}) from {corpus.name}")
        with atomic_folder(folder, keep_existing=True) as part:
            made = train_tokenizer(corpus, wanted.algorithm, wanted.size, sentinels=sentinels)
            made.model_max_length = settings.length
            made.save_pretrained(part)
    return models.load_tokenizer(folder)
