"""Text for methods that look at what models do with it: rows of tokens for each model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graft import data, models
from graft.data.objective_rows import objective_rows
from graft.data.objectives import Causal, Prefix, is_prefix_lm
from graft.data.rows import Row, Rows
from graft.evaluate.limits import longest_context
from graft.merge._layers import Layers
from graft.merge._options import OnData
from graft.merge.inputs import inputs
from graft.merge.settings import MergeSettings
from graft.train.attention import Batch, keeps_apart
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST = 512
"""Tokens of context where nothing is said, if the model can take as many."""


def device_of(job: Job) -> str:
    """Where models run: where the job says, else the accelerator where there is one."""
    return job.device or ("cuda" if torch.cuda.is_available() else "cpu")


def load(job: Job, settings: MergeSettings, name: str) -> PreTrainedModel:
    """A parent as a model in float32, in evaluation mode; an adapter put into the model that it stands on."""
    parent = inputs(settings, job.models)[name]
    model = models.load(parent.home, dtype=torch.float32, device=device_of(job))
    if parent.folder != parent.home:
        layers = Layers.of(model)
        with parent.open() as reader, torch.no_grad():
            for stored in reader.names:
                if parameter := layers.parameter(stored):
                    model.get_parameter(parameter).copy_(reader.read(stored))
    return model


def rows_for(job: Job, settings: OnData, model: PreTrainedModel, name: str) -> Rows:
    """The rows that are read for the model `name`; `model` is the one that reads them."""
    reference, split = data.split_ref(settings.data_of(name))
    home = inputs(settings, job.models)[name].home
    length = settings.length or min(longest_context(model.config), LONGEST)
    objective = Prefix() if is_prefix_lm(model.config) else Causal()
    return objective_rows(
        data.open_corpus(job.data, reference, job.root), split, models.load_tokenizer(home), objective,
        length=length, seed=job.seed, cache=job.cache, together=keeps_apart(model, length),
    )  # fmt: skip


def batches(settings: OnData, rows: Rows, size: int, device: Any) -> Iterator[Batch]:
    """Batches of `size` rows until `settings.tokens` tokens have come, or each row once."""
    read, index = 0, 0
    while read < settings.tokens and index < len(rows):
        batch = rows.collate([rows[i] for i in range(index, min(index + size, len(rows)))])
        read += int(real(batch).sum())
        index += size
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def rows_of_step(rows: Rows, settings: OnData, size: int, step: int) -> list[Row]:
    """`size` rows for a step of learning: those of `settings.tokens` tokens, over and over in one order."""
    pool = min(len(rows), max(settings.tokens // len(rows[0]["input_ids"]), 1))
    return [rows[(step * size + i) % pool] for i in range(min(size, pool))]


def real(batch: Batch) -> torch.Tensor:
    """[batch, length] bool: which places hold tokens and not padding."""
    if "segments" in batch:
        return batch["segments"] >= 0
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def what_is_read(settings: OnData, names: Sequence[str]) -> dict[str, Any]:
    """What of the settings decides the rows of some models, for `made_of`."""
    return {"data": [settings.data_of(name) for name in names], "tokens": settings.tokens, "length": settings.length}
