"""Learning the shares of models in their mean: gradients go through the mixing, weights are read when they are needed.

Held are one model in float32 with its gradient and one tensor of another, however many models are mixed: the gradient
of a share is the inner product of the mixture's gradient with the model's own tensor.

_gm: groups of tensors, models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft import data, models
from graft.checkpoint import FLOATS, TensorReader
from graft.data.objective_rows import objective_rows
from graft.data.objectives import objective_for
from graft.disk import atomic_write
from graft.errors import CannotCombine
from graft.evaluate.limits import longest_context
from graft.evaluate.unseen import check_unseen
from graft.folders import architecture_of
from graft.merge.candidates import check_parents, stored_names
from graft.merge.engine import stamps
from graft.merge.inputs import inputs
from graft.merge.preflight import layout
from graft.merge.slices import LAYER
from graft.progress import Progress
from graft.train.attention import keeps_apart
from graft.train.losses import TokenLoss
from graft.verb import Job

if TYPE_CHECKING:
    from graft.merge.learned_soup import Settings

Batch = Mapping[str, Tensor]
Read = Callable[[int], Tensor]
"""A tensor of one of the models, float32."""


class Mix(torch.autograd.Function):
    """`sum_m w_m θ_m` of `weights_m [m]`, the tensors read one after the other, in both directions."""

    @staticmethod
    def forward(ctx: Any, weights_m: Tensor, read: Read) -> Tensor:
        ctx.read, ctx.count = read, len(weights_m)
        total = read(0) * weights_m[0]
        for model in range(1, ctx.count):
            total.add_(read(model), alpha=float(weights_m[model]))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = upstream
        inner = [(gradient * ctx.read(model)).sum() for model in range(ctx.count)]
        return torch.stack(inner), None


class Mixture:
    """Stands for a model whose weights are mixed anew for each call; a loss takes it as it takes a model."""

    def __init__(self, model: Any, names: Mapping[str, str], reads: Mapping[str, Read], groups: Mapping[str, int]):
        """`names`: stored name → name in the model. `groups`: the group of each stored tensor."""
        self.module = model.requires_grad_(False)
        self.names, self.reads, self.groups = names, reads, groups

    def mixed(self, logits_gm: Tensor) -> dict[str, Tensor]:
        """The mixed weights by their names in the model."""
        shares = logits_gm.softmax(-1)
        return {self.names[n]: Mix.apply(shares[self.groups[n]], read) for n, read in self.reads.items()}

    def at(self, logits_gm: Tensor, temperature: Tensor | None = None) -> Callable[..., Any]:
        """What can be called like the model, with weights for these shares and the logits times `temperature`."""
        weights = self.mixed(logits_gm)
        return _Called(self.module, weights, temperature)


class _Called:
    def __init__(self, module: Any, weights: Mapping[str, Tensor], temperature: Tensor | None):
        self.module, self.weights, self.temperature = module, weights, temperature

    def __call__(self, **inputs: Any) -> Any:
        made = torch.func.functional_call(self.module, dict(self.weights), (), inputs)
        if self.temperature is not None:
            made.logits = made.logits * self.temperature
        return made


@dataclass
class State:
    """How far the learning is; plain numbers, so that it can be kept as JSON."""

    epoch: int
    logits: list[list[float]]
    temperature: float
    moments: list[Any] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Nats a token over all rows, before the first epoch and after each."""
    best: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Learned:
    """The shares [groups][models] that were best, and how that was found."""

    groups: list[str]
    """A pattern of names for each, the last `*`."""
    shares: list[list[float]]
    state: State

    def weights(self, names: Sequence[str]) -> dict[str, Any]:
        """As a linear merge gives them: a number for each model, or rules by layer."""
        if len(self.groups) == 1:
            return dict(zip(names, self.shares[0], strict=True))
        columns = zip(*self.shares, strict=True)
        return {name: dict(zip(self.groups, column, strict=True)) for name, column in zip(names, columns, strict=True)}

    def notes(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "shares": dict(zip(self.groups, self.shares, strict=True)),
            "losses": self.state.losses,
            "temperature": self.state.temperature,
        }


def learn(job: Job, settings: Settings) -> Learned:
    """The shares that make the loss on held-out data smallest, the first of equals; those of equal shares are tried.

    Goes on after a kill with the epoch that was not finished. Raises CannotCombine for models that have seen the data,
    that may not be merged, or whose tensors are converted while they are loaded.
    """
    check_unseen(job.models, [settings.on], job.data, job.root)
    check_parents(job)
    with ExitStack() as opened:
        parts = list(inputs(settings, job.models).values())
        readers = [opened.enter_context(part.open()) for part in parts]
        mixture, groups = _mixture(job, settings, readers, parts[0].home)
        batches = _batches(job, settings, mixture.module, parts[0].home)
        state = _resumed(job, settings) or State(0, [[0.0] * len(readers)] * len(groups), 1.0)
        learner = _Learner(mixture, batches, settings, state)
        with Progress("learning shares", settings.epochs, "epochs") as progress:
            progress.begin_at(state.epoch)
            while state.epoch < settings.epochs:
                learner.epoch(job.seed)
                _keep(job, settings, state)
                progress.advance(1, f"loss {state.losses[-1]:.4f}")
    return Learned(groups, torch.tensor(state.best, dtype=torch.float64).softmax(-1).tolist(), state)


def _mixture(job: Job, settings: Settings, readers: Sequence[TensorReader], home: Path) -> tuple[Mixture, list[str]]:
    plan = layout(settings, job.models)
    device = job.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = models.load(home, dtype="float32", device=device)
    stored = stored_names(model, home)
    # other parents may call a tensor what the model itself does
    names = stored and {**{name: name for name in stored.values()}, **stored}
    floats = [name for name, (dtype, _) in plan.tensors.items() if dtype in FLOATS]
    if names is None or not set(floats) <= set(names):
        raise CannotCombine(
            f"the tensors of {settings.names[0]} are converted while it is loaded: shares cannot be learned through "
            "that; use greedy_soup, or search the weights of a linear merge"
        )

    def read_of(name: str) -> Read:
        places = [plan.places[name][model] for model in settings.names]
        return lambda number: readers[number].read(places[number]).float().to(device)

    patterns = group_patterns(floats) if settings.by_layer else ["*"]
    place = {pattern: number for number, pattern in enumerate(patterns)}
    groups = {name: place[_pattern(name)] if settings.by_layer else 0 for name in floats}
    return Mixture(model, names, {name: read_of(name) for name in floats}, groups), patterns


def group_patterns(names: Sequence[str]) -> list[str]:
    """A pattern for each layer, in order, then `*` for what lies outside of layers."""
    layers = sorted({(match[1], int(match[2])) for name in names if (match := LAYER.fullmatch(name))})
    return [*(f"{prefix}{number}.*" for prefix, number in layers), "*"]


def _pattern(name: str) -> str:
    match = LAYER.fullmatch(name)
    return f"{match[1]}{match[2]}.*" if match else "*"


def _batches(job: Job, settings: Settings, model: Any, home: Path) -> list[Batch]:
    """The rows of the data, `batch_size` at a time."""
    name, split = data.split_ref(settings.on)
    corpus = data.open_corpus(job.data, name, job.root)
    length = longest_context(model.config, settings.length)
    rows = objective_rows(
        corpus,
        split,
        models.load_tokenizer(home),
        objective_for(architecture_of(model.config.to_dict()), None, model.config),
        length=length,
        seed=job.seed,
        cache=job.cache,
        together=bool(model.config.is_encoder_decoder) or keeps_apart(model, length),
    )
    found = [rows[index] for index in range(min(len(rows), settings.rows))]
    size = settings.batch_size
    cut = [rows.collate(found[start : start + size]) for start in range(0, len(found), size)]
    return [{name: value.to(model.device) for name, value in batch.items()} for batch in cut]


class _Learner:
    """Shares under way: AdamW with a constant rate."""

    def __init__(self, mixture: Mixture, batches: Sequence[Batch], settings: Settings, state: State):
        self.mixture, self.batches, self.state = mixture, batches, state
        self.loss = TokenLoss()
        device = mixture.module.device
        self.logits = torch.tensor(state.logits, device=device, requires_grad=True)
        self.temperature = torch.tensor(state.temperature, device=device, requires_grad=settings.temperature)
        learned = [self.logits, *([self.temperature] if settings.temperature else [])]
        self.optimizer = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=0.0)
        if state.moments:
            kept = [{name: torch.tensor(value) for name, value in one.items()} for one in state.moments]
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": dict(enumerate(kept)), "param_groups": groups})

    def epoch(self, seed: int) -> None:
        """Go through the data once and take note of the loss; before the first, of that of equal shares."""
        if not self.state.losses:
            self._note(self.whole())
        order = torch.Generator().manual_seed(seed * 1000 + self.state.epoch)
        for number in torch.randperm(len(self.batches), generator=order).tolist():
            batch = self.batches[number]
            self.optimizer.zero_grad()
            (self._sum(batch) / max(self.loss.weight(batch), 1)).backward()
            self.optimizer.step()
        self.state.epoch += 1
        self.state.logits, self.state.temperature = self.logits.tolist(), float(self.temperature)
        moments = self.optimizer.state_dict()["state"]
        self.state.moments = [{n: t.tolist() for n, t in moments[i].items()} for i in sorted(moments)]
        self._note(self.whole())

    def _sum(self, batch: Batch) -> Tensor:
        temperature = self.temperature if self.temperature.requires_grad else None
        return self.loss(self.mixture.at(self.logits, temperature), batch)

    @torch.no_grad()
    def whole(self) -> float:
        """Nats a token over all rows, with the logits as the merge will give them."""
        called = self.mixture.at(self.logits)
        total = sum(float(self.loss(called, batch)) for batch in self.batches)
        return total / max(sum(self.loss.weight(batch) for batch in self.batches), 1)

    def _note(self, loss: float) -> None:
        if not self.state.losses or loss < min(self.state.losses):
            self.state.best = self.logits.tolist()
        self.state.losses.append(loss)


def _identity(job: Job, settings: Settings) -> list[Any]:
    return [settings.plain(), job.seed, stamps(job.models)]


def _keep(job: Job, settings: Settings, state: State) -> None:
    what = {"of": _identity(job, settings), "state": asdict(state)}
    atomic_write(job.scratch / "learned.json", json.dumps(what))


def _resumed(job: Job, settings: Settings) -> State | None:
    path = job.scratch / "learned.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    same = kept["of"] == json.loads(json.dumps(_identity(job, settings)))
    return State(**kept["state"]) if same else None
