"""Learning λ by the entropy of predictions."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.data.alone import IGNORED
from graft.data.rows import Rows
from graft.disk import atomic_write
from graft.merge._composed import Composed
from graft.merge._kept import made_of, rooms
from graft.merge._reading import rows_for, rows_of_step, what_is_read
from graft.merge.adamerging import Settings, entropy
from graft.merge.prepared import Prepared
from graft.merge.slices import LAYER
from graft.progress import Progress
from graft.train.attention import model_inputs
from graft.train.losses import shifted_left
from graft.verb import Job

BETAS, EPSILON = (0.9, 0.999), 1e-8
LOGITS = 1 << 26
"""Logits that are looked at together, at most (or those of one row)."""


@dataclass
class State:
    """λ, `[groups, models]` float64, with the moments of Adam: all that a killed run needs."""

    lambdas: Tensor
    step: int = 0
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    entropies: list[float] = field(default_factory=list)
    """Mean entropy in nats at every step, before it."""

    def __post_init__(self) -> None:
        self.first, self.second = torch.zeros_like(self.lambdas), torch.zeros_like(self.lambdas)

    def update(self, gradient: Tensor, rate: float, clamp: bool) -> None:
        """A step of Adam (Kingma and Ba 2015, algorithm 1)."""
        self.step += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        size = (self.second / (1 - BETAS[1] ** self.step)).sqrt_().add_(EPSILON)
        self.lambdas.sub_(self.first / size, alpha=rate / (1 - BETAS[0] ** self.step))
        if clamp:
            self.lambdas.clamp_(0, 1)

    def write(self, file: Path, made_of: Any) -> None:
        """Everything, exactly."""
        plain = {name: getattr(self, name).tolist() for name in ("lambdas", "first", "second")}
        plain |= {"step": self.step, "entropies": self.entropies, "made_of": made_of}
        atomic_write(file, json.dumps(plain))

    def read(self, file: Path, made_of: Any) -> None:
        """What a killed run of the same work has left, if there is any."""
        found = json.loads(file.read_text()) if file.is_file() else {}
        if found.get("made_of") == json.loads(json.dumps(made_of)):
            for name in ("lambdas", "first", "second"):
                setattr(self, name, torch.tensor(found[name], dtype=torch.float64))
            self.step, self.entropies = found["step"], found["entropies"]


def group_of(parameter: str, by: str) -> str:
    """What a parameter shares its λ with: all, those of its layer, or none."""
    if by == "model":
        return "model"
    layer = LAYER.fullmatch(parameter) if by == "layer" else None
    return f"{layer[1]}{layer[2]}" if layer else parameter


def learned(job: Job, settings: Settings) -> Prepared:
    """λ for every tensor of the output and every model, from text alone."""
    with Composed(job, settings) as composed:
        places = {parameter: group_of(parameter, settings.by) for parameter in composed.names}
        groups = list(dict.fromkeys(places.values()))
        index = {parameter: groups.index(group) for parameter, group in places.items()}
        state = State(torch.full((len(groups), len(settings.names)), settings.start, dtype=torch.float64))
        work, file = work_of(job, settings), "lambdas.json"
        for room in rooms(job):
            state.read(room / file, work)
        sets = {settings.data_of(name): name for name in settings.names}
        texts = [rows_for(job, settings, composed.model, name) for name in sets.values()]
        with Progress("learning λ", settings.steps, "steps") as progress:
            progress.begin_at(state.step)
            while state.step < settings.steps:
                _learn(composed, settings, texts, index, state)
                state.write(job.scratch / file, work)
                progress.advance(1, f"entropy {state.entropies[-1]:.4f}")
    named = [dict(zip(settings.names, found, strict=True)) for found in state.lambdas.tolist()]
    survey = {name: state.lambdas[index[parameter]].tolist() for name, parameter in composed.outputs.items()}
    notes = {"lambdas": dict(zip(groups, named, strict=True)), "entropy_by_step": state.entropies}
    return Prepared(settings, notes, survey)


def work_of(job: Job, settings: Settings) -> dict[str, Any]:
    """What decides every λ."""
    how = {key: getattr(settings, key) for key in ("by", "start", "steps", "learning_rate", "batch_size", "clamp")}
    read = what_is_read(settings, settings.names)
    return made_of(job, settings, settings.parents, weights=settings.weights, **how, **read)


def _learn(composed: Composed, settings: Settings, texts: list[Rows], index: dict[str, int], state: State) -> None:
    """One step: the weights for the λ there are, the gradient of the mean entropy, new λ."""
    gradient = torch.zeros_like(state.lambdas)

    def collect(parameter: str, slope: Tensor) -> None:
        for place, (name, weight) in enumerate(zip(settings.names, settings.weights, strict=True)):
            product = float((slope * composed.delta(parameter, name)).sum(dtype=torch.float64))
            gradient[index[parameter], place] += weight * product

    def change(parameter: str) -> Tensor:
        factors = (state.lambdas[index[parameter]] * torch.tensor(settings.weights, dtype=torch.float64)).tolist()
        total = composed.delta(parameter, settings.names[0]) * factors[0]
        for name, factor in zip(settings.names[1:], factors[1:], strict=True):
            total.add_(composed.delta(parameter, name), alpha=factor)
        return total

    composed.compose(change)
    with composed.gradients(collect):
        found = [uncertainty(composed, settings, rows, state.step, len(texts)) for rows in texts]
    state.entropies.append(sum(found) / len(found))
    state.update(gradient, settings.learning_rate, settings.clamp)


def uncertainty(composed: Composed, settings: Settings, rows: Rows, step: int, sets: int) -> float:
    """Mean entropy at the tokens of a batch, with backward passes through its share of the objective."""
    read = rows_of_step(rows, settings, settings.batch_size, step)
    counted = sum(int((row["labels"][1:] != IGNORED).sum()) for row in read)
    model = composed.model
    at_once = max(LOGITS // (max(len(row["input_ids"]) for row in read) * model.config.vocab_size), 1)
    total = 0.0
    for start in range(0, len(read), at_once):
        batch = {name: t.to(model.device) for name, t in rows.collate(read[start : start + at_once]).items()}
        logits = model(**model_inputs(model, batch), use_cache=False).logits
        loss = entropy(logits)[shifted_left(batch["labels"]) != IGNORED].sum() / max(counted, 1)
        (loss / sets).backward()
        total += float(loss.detach())
    return total
