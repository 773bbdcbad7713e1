"""Learning the region of a task vector that makes its model good at its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from graft.checkpoint import FLOATS, Headers, TensorWriter
from graft.data.alone import IGNORED
from graft.data.rows import Rows
from graft.merge._composed import Composed
from graft.merge._kept import Measured, kept, made_of
from graft.merge._parameters import as_stored
from graft.merge._reading import rows_for, rows_of_step, what_is_read
from graft.merge._select import Cut
from graft.merge.inputs import inputs
from graft.merge.localize_and_stitch import Settings, survey
from graft.merge.prepared import Prepared
from graft.merge.stream import Tensors, Workers
from graft.progress import Progress
from graft.train.losses import TokenLoss
from graft.verb import Job

SHARE = "share.json"


class Regions(Measured):
    """The regions of all models: 1 in them, 0 elsewhere; on disk a byte an element."""


def learned(job: Job, settings: Settings) -> Prepared:
    """The regions of all models."""
    cuts: list[Mapping[str, list[Cut]]] = []
    folders = {}
    with Composed(job, settings) as composed:
        for place, name in enumerate(settings.names):

            def make(folder: Path) -> None:
                if not cuts:
                    cuts.append(largest_of(composed, settings))
                start = {parameter: found[place] for parameter, found in cuts[0].items()}  # noqa: B023
                scores = localized(composed, job, settings, name, start)  # noqa: B023
                _write(composed, folder, scores, inputs(settings, job.models)[name].headers, name)  # noqa: B023

            how = {key: getattr(settings, key) for key in ("steps", "learning_rate", "l1", "bias", "batch_size")}
            how |= {"density": settings.densities[place], **what_is_read(settings, [name])}
            folders[name] = kept(job, f"regions/{place}", made_of(job, settings, [settings.base, name], **how), make)
    shares = {name: json.loads((folder / SHARE).read_text()) for name, folder in folders.items()}
    return Prepared(settings, {"share_in_region": shares}, Regions(folders))


def largest_of(composed: Composed, settings: Settings) -> Mapping[str, list[Cut]]:
    """The largest of every task vector, as where regions are not learned; by parameter."""
    with Workers() as workers:
        tensors = []
        for parameter in composed.names:
            shape = tuple(composed.model.get_parameter(parameter).shape)
            models = [composed.source(parameter, name) for name in settings.names]
            tensors.append(Tensors(parameter, shape, models, composed.source(parameter, settings.base), workers))
        return survey(tensors, settings)


def localized(
    composed: Composed, job: Job, settings: Settings, name: str, start: Mapping[str, Cut]
) -> dict[str, Tensor]:
    """S of every parameter after gradient descent on `loss(θ₀ + σ(S) δ) + l1 sum σ(S)`, float32, in its shape.

    He et al. 2024, arXiv:2408.13656, equation 2; S begins at `bias` in the cut and at −`bias` outside.
    """
    scores = {}
    for parameter, cut in start.items():
        delta = composed.delta(parameter, name)
        inside = cut.keep(delta.abs().flatten(), 0).view(delta.shape)
        scores[parameter] = (inside.float() * 2 - 1).mul_(settings.bias)

    def descend(parameter: str, gradient: Tensor) -> None:
        gates = scores[parameter].sigmoid()
        slope = (gradient * composed.delta(parameter, name)).add_(settings.l1)
        scores[parameter].sub_(slope.mul_(gates * (1 - gates)), alpha=settings.learning_rate)

    rows = rows_for(job, settings, composed.model, name)
    with Progress(f"localizing {name}", settings.steps, "steps") as progress:
        for step in range(settings.steps):
            composed.compose(lambda parameter: scores[parameter].sigmoid().mul_(composed.delta(parameter, name)))
            with composed.gradients(descend):
                loss = _loss(composed, settings, rows, step)
            progress.advance(1, f"loss {loss:.4f}")
    return scores


def _loss(composed: Composed, settings: Settings, rows: Rows, step: int) -> float:
    """Mean loss a token of a batch, with a backward pass."""
    batch = rows.collate(rows_of_step(rows, settings, settings.batch_size, step))
    batch = {key: tensor.to(composed.model.device) for key, tensor in batch.items()}
    loss = TokenLoss()(composed.model, batch) / max(int((batch["labels"] != IGNORED).sum()), 1)
    loss.backward()
    return float(loss.detach())


def _write(composed: Composed, folder: Path, scores: Mapping[str, Tensor], headers: Headers, name: str) -> None:
    """The region of one model: where S is above 0, under the names of its own tensors."""
    regions = {parameter: (score > 0).to("cpu", torch.uint8) for parameter, score in scores.items()}
    stored = [tensor for tensor, header in headers.items() if header.dtype in FLOATS]
    made = as_stored(composed.model, composed.layers, regions, stored, name)
    writer = TensorWriter(folder, {tensor: ("U8", tuple(region.shape)) for tensor, region in made.items()})
    for tensor, region in made.items():
        writer.write(tensor, 0, region.contiguous().numpy().reshape(-1).data)
    writer.close()
    whole = sum(region.numel() for region in regions.values())
    (folder / SHARE).write_text(json.dumps(sum(int(region.sum()) for region in regions.values()) / whole))
