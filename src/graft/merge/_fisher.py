"""Measuring the diagonal of the Fisher information of a model, and reading it in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graft.checkpoint import FLOATS, TensorWriter
from graft.data.alone import IGNORED
from graft.errors import CannotCombine
from graft.merge._kept import Measured, kept, made_of
from graft.merge._layers import Layers
from graft.merge._parameters import as_stored, parameters_of
from graft.merge._reading import batches, device_of, load, rows_for, what_is_read
from graft.merge.candidates import check_parents
from graft.merge.fisher import Settings
from graft.merge.inputs import inputs
from graft.merge.prepared import Prepared
from graft.merge.stream import Source
from graft.progress import Progress
from graft.train.attention import Batch, model_inputs
from graft.train.cross_entropy import summed_cross_entropy
from graft.train.losses import shifted_left
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEAN = "mean.json"


class Fishers(Measured):
    """The Fisher information of every model, on disk; `scales` are what each is multiplied by."""

    def __init__(self, folders: Mapping[str, Path], scales: Mapping[str, float]):
        super().__init__(folders)
        self.scales = scales

    def read(self, source: Source, start: int, count: int) -> Tensor:
        """`count` values of a model's tensor from element `start`, flat, float32."""
        return super().read(source, start, count).mul_(self.scales[source.model])


def measured(job: Job, settings: Settings) -> Prepared:
    """The Fisher information of all models. What cannot be merged is refused before that takes its time."""
    check_parents(job)
    folders = {
        name: kept(
            job,
            f"fisher/{place}",
            made_of(job, settings, [name], labels=settings.labels, **what_is_read(settings, [name])),
            lambda folder: _write(job, settings, name, folder),  # noqa: B023
        )
        for place, name in enumerate(settings.names)
    }
    means = {name: json.loads((folder / MEAN).read_text()) for name, folder in folders.items()}
    whole = sum(means.values()) / len(means)
    scales = {name: 1 / (mean if settings.normalise else whole) for name, mean in means.items()}
    return Prepared(settings, {"mean_fisher_information": means}, Fishers(folders, scales))


def _write(job: Job, settings: Settings, name: str, folder: Path) -> None:
    """Measure one model and write a tensor for each that its folder stores, under the same name."""
    headers = inputs(settings, job.models)[name].headers
    stored = [header for header in headers.values() if header.dtype in FLOATS]
    model = load(job, settings, name)
    layers = Layers.of(model)
    parameters_of(layers, {header.name: header.name for header in stored}, name)
    rows = rows_for(job, settings, model, name)
    found = diagonal(model, batches(settings, rows, 1, device_of(job)), settings.labels, job.seed, settings.tokens)
    mean = sum(float(f.sum(dtype=torch.float64)) for f in found.values()) / sum(f.numel() for f in found.values())
    if not mean > 0:
        raise CannotCombine(
            f"expected gradients of {name} on {settings.data_of(name)}, found that all of them are zero"
        )
    writer = TensorWriter(folder, {header.name: ("F32", header.shape) for header in stored})
    made = as_stored(model, layers, found, [header.name for header in stored], name)
    for tensor, value in made.items():
        writer.write(tensor, 0, value.cpu().contiguous().numpy().reshape(-1).data)
    writer.close()
    (folder / MEAN).write_text(json.dumps(mean))


def diagonal(model: PreTrainedModel, rows: Iterable[Batch], labels: str, seed: int, tokens: int) -> dict[str, Tensor]:
    """`sum_rows (∂ sum_t log p(y_t) / ∂θ)² / tokens` of every parameter, float32, by its name.

    A row is one example: its gradient is squared whole. `labels`: y is the text's next token (`data`, the empirical
    Fisher information) or drawn from the model's own distribution there (`sampled`). No more is held than the model,
    the result and the gradient of one parameter. Matena and Raffel 2022, arXiv:2111.09832, equation 3.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    hooks = [p.register_post_accumulate_grad_hook(_squared_into(sums[name])) for name, p in model.named_parameters()]
    draw = torch.Generator(device=model.device).manual_seed(seed)
    counted = 0
    with Progress("measuring Fisher information", tokens, "tokens") as progress:
        for batch in rows:
            logits = model(**model_inputs(model, batch), use_cache=False).logits
            wanted = shifted_left(batch["labels"])
            if labels == "sampled":
                drawn = torch.multinomial(logits.detach().float().softmax(-1).flatten(0, 1), 1, generator=draw)
                wanted = torch.where(wanted == IGNORED, wanted, drawn.view_as(wanted))
            summed_cross_entropy(logits, wanted).backward()
            size = int((wanted != IGNORED).sum())
            counted += size
            progress.advance(size)
    for hook in hooks:
        hook.remove()
    return {name: total.div_(max(counted, 1)) for name, total in sums.items()}


def _squared_into(total: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.addcmul_(parameter.grad, parameter.grad)
        parameter.grad = None

    return add
