"""The one training loop: a model, rows and an objective go in; trained weights, a log and kept checkpoints come out.

One step: read the rows of the step (made ahead by a thread) → agree on the weight of the whole step → forward and
backward of each piece, scaled by that weight → clip → AdamW → average. Nothing in it waits for the device; losses are
read a few at a time. The state to resume from is written now and then into `scratch`; a killed run goes on from there
and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from graft.checkpoint import atomic_folder
from graft.data.rows import Rows
from graft.errors import RequestError, TrainingError
from graft.progress import say
from graft.train.allocator import memory_kept
from graft.train.batches import Ahead, Batch, Step, make_step, spans, tokens_in
from graft.train.interrupt import Interrupt
from graft.train.journal import Journal
from graft.train.kept import Kept
from graft.train.learner import Learner
from graft.train.place import Place
from graft.train.random_state import random_state, seed_all, set_random_state
from graft.train.schedule import rate
from graft.train.settings import TrainSettings
from graft.train.shards import whole_on_main
from graft.train.state import WRITTEN_A_SECOND, forget_states, pause, read_state, write_state

Save = Callable[[Any, Path], None]
"""Writes a model as a complete Hugging Face folder into a folder that exists and is empty."""

LOOK_S = 0.5
"""Losses are read from the device, checked and logged this often."""

DEV_SHARE, DEV_ROWS = 0.2, 64
"""A dev loss reads this share of the rows that are trained on between two of them, but so many rows at least: it costs
a few percent of the time, however large the dev split is."""


class Objective(Protocol):
    """What is made small. One that calls the model with weights of its own says so: its `functional` is true."""

    def weight(self, batch: Batch) -> float:
        """Units the loss sums over (for example label tokens). Called on the CPU, in a thread of its own."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum of the losses over those units, a scalar."""


@dataclass(frozen=True)
class TrainResult:
    """What came out: last and best scores, optimizer steps done, tokens read."""

    metrics: dict[str, Any]
    steps: int
    tokens: int


@dataclass
class Position:
    """How far a training is; with tensors and random state, all there is to it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    dev: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    waited: int = 0


@dataclass(frozen=True)
class Pending:
    """A step whose loss has not been read from the device yet."""

    step: int
    loss: torch.Tensor
    norm: torch.Tensor
    weight: float
    tokens: int
    learning_rate: float
    seconds: float


def train(
    model: nn.Module,
    rows: Rows,
    objective: Objective,
    settings: TrainSettings,
    out: Path,
    *,
    scratch: Path,
    seed: int,
    dev: Rows | None = None,
    device: str | None = None,
    save: Save | None = None,
    before_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train `model` in place; go on where a killed run with the same `scratch` stood.

    Parameters that require a gradient are trained, in fp32. The gradient is that of the sum of the losses over the
    step's rows divided by their weight, however the rows are cut into pieces and spread over processes. `dev` gives
    the dev loss (mean over all units of its first rows). `save` is needed for kept checkpoints and the moving average.
    Writes `out/log.jsonl` and `out/checkpoints/`; only the main process writes. `before_step(step)` is called before
    step 0, 1, …, in every process; what it changes must be a buffer of the model, which a resumed training has again.

    Raises RequestError for settings that do not fit what is given, TrainingError where labels are all masked or the
    loss is not finite, KeyboardInterrupt after Ctrl-C (with the state saved).
    """
    place = Place(device, settings.track, Path(out), settings.parallel)
    _check_request(settings, rows, dev, save, place.shares)
    training = Training(model, rows, objective, settings, Path(out), Path(scratch), seed, dev, save, place, before_step)
    with Interrupt() as interrupt, memory_kept():
        training.resume()
        training.run(interrupt)
    return training.finish()


def _check_request(settings: TrainSettings, rows: Rows, dev: Rows | None, save: Save | None, shares: int) -> None:
    if len(rows) == 0:
        raise RequestError("expected rows to train on, found none; give more data or a shorter length")
    if settings.batch_size % (settings.accumulate * shares):
        raise RequestError(
            f"expected batch_size to be a multiple of accumulate times processes ({settings.accumulate} × {shares}), "
            f"found {settings.batch_size}"
        )
    needs_dev = [name for name, on in (("keep.best", settings.keep.best), ("early_stopping", settings.early_stopping))
                 if on]  # fmt: skip
    if needs_dev and (dev is None or len(dev) == 0):
        raise RequestError(f"{' and '.join(needs_dev)} need dev rows to measure on, found none; name a dev split")
    if save is None and (settings.keep.last or settings.keep.best or settings.ema):
        raise RequestError("keep and ema need a way to save checkpoints (`save`), found none")


class Training:
    """One training under way."""

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        objective: Objective,
        settings: TrainSettings,
        out: Path,
        scratch: Path,
        seed: int,
        dev: Rows | None,
        save: Save | None,
        place: Place,
        before_step: Callable[[int], None] | None = None,
    ):
        self.before_step = before_step
        self.rows, self.dev, self.objective, self.settings = rows, dev, objective, settings
        self.out, self.scratch, self.seed, self.save, self.place = out, scratch, seed, save, place
        self.model = self._prepare(model)
        self.learner = Learner(model, settings, place, getattr(objective, "functional", False))
        self.average = self.learner.average
        self.steps = settings.budget.steps(len(rows), settings.batch_size, row_tokens(rows))
        self.every = settings.evaluate_every or max(1, self.steps // 10)
        self.dev_rows = max(DEV_ROWS, int(DEV_SHARE * self.every * settings.batch_size))
        self.at = Position()
        self.kept_before: dict[int, float | None] = {}
        self.pending: list[Pending] = []
        self.kept: Kept | None = None
        self.journal: Journal

    def _prepare(self, model: nn.Module) -> nn.Module:
        model.train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if self.settings.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        if self.settings.compile:
            model.compile()
        return model

    # -- resuming ---------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """Hash of what must be the same for a state to be this training's."""
        settings = {k: v for k, v in self.settings.content().items() if k not in ("checkpoint_every", "track")}
        facts = [settings, self.seed, self.steps, len(self.rows), self.learner.shapes]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def resume(self) -> None:
        """Go to where the newest whole state of this training in `scratch` stands; to the start where there is none."""
        state = read_state(self.scratch)
        if state is not None and state.facts["identity"] != self.identity:
            say(f"the state in {self.scratch} is of another training (other settings, seed or data): starting anew")
            if self.place.main:
                forget_states(self.scratch)
            state = None
        if state is None:
            seed_all(self.seed + self.place.share)
            self._check_labels()
            self.learner.begin()
            return
        self.learner.begin(state.tensors)
        self.learner.scaler.load_state_dict(state.facts["scaler"])
        self.at = Position(**state.facts["at"])
        self.kept_before = {int(step): score for step, score in state.facts["kept"].items()}
        states = state.facts["random"]
        if len(states) == self.place.world:
            set_random_state(states[self.place.rank], self.place.device)
        else:
            seed_all(self.seed + self.at.step * 1000 + self.place.share)

    def _check_labels(self) -> None:
        """Raises TrainingError where no row of an epoch has anything to learn from."""
        size = self.settings.batch_size
        for start in range(0, len(self.rows), size):
            if make_step(self.rows, [range(start, min(start + size, len(self.rows)))], self.objective).weight > 0:
                return
        raise TrainingError(
            f"expected labels to learn from, found all of them masked in all {len(self.rows)} rows; "
            "look at the format of the data (is the target empty?) and at the length (is the target cut off?)"
        )

    def _write_state(self) -> None:
        started = time.monotonic()
        random = self.place.gather(random_state(self.place.device))
        tensors = whole_on_main(self.learner.tensors(), self.place.main)
        if self.place.main:
            self.journal.sync()
            facts = {
                "identity": self.identity,
                "at": asdict(self.at) | {"seconds": self._seconds()},
                "kept": self.kept.scores if self.kept else {},
                "scaler": self.learner.scaler.state_dict(),
                "random": random,
            }
            write_state(self.scratch, self.at.step, tensors, facts)
        self.place.wait()
        self.written = time.monotonic()
        self.write_cost = self.written - started

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self, interrupt: Interrupt) -> None:
        """Do the steps that are left."""
        self.started = self.written = self.looked = time.monotonic()
        self.write_cost, self.logged_tokens = self.learner.bytes / WRITTEN_A_SECOND, self.at.tokens
        keep = self.settings.keep
        self.kept = Kept(self.out / "checkpoints", keep, self.kept_before, self.at.step) if self.place.main else None
        rows, pin = self.rows, self.place.device.type == "cuda"
        with (
            Journal(self.place, self.out, self.at.step, self.steps, self.settings.plain(), None) as self.journal,
            Ahead(rows, self._plans(), self.objective, pin) as steps,
        ):
            for step in steps:
                self._advance(step, interrupt)
                if self._patience_is_over():
                    break
            self._look()

    def _plans(self) -> Iterator[list[range]]:
        steps = range(self.at.step, self.at.step if self._patience_is_over() else self.steps)
        shape = (self.settings.batch_size, self.settings.accumulate, self.place.share, self.place.shares)
        return (spans(step, *shape) for step in steps)

    def _advance(self, step: Step, interrupt: Interrupt) -> None:
        """One step and what is due behind it. All processes agree on what that is."""
        main = self.place.main
        weight, tokens, asked, state_due, look_due = self.place.total(
            [step.weight, step.tokens, interrupt.asked, main and self._state_is_due(), main and self._look_is_due()]
        )
        self._learn(step, weight, int(tokens))
        measure_due = self.at.step % self.every == 0 or self.at.step == self.steps
        if asked or state_due or look_due or measure_due:
            self._look()
        if measure_due:
            self._measure()
        if asked or state_due:
            self._write_state()
        if asked:
            raise KeyboardInterrupt(f"stopped after step {self.at.step}; the state is saved, the same command goes on")

    def _learn(self, step: Step, weight: float, tokens: int) -> None:
        """Forward, backward and update. A step in which every label is masked changes nothing."""
        learning_rate = rate(self.at.step, self.steps, self.settings)
        if self.before_step is not None:
            self.before_step(self.at.step)
        self.at.step += 1
        self.at.tokens += tokens
        if weight == 0:
            return
        self.learner.set_rate(learning_rate)
        loss = self._backward(step, weight)
        norm = self.learner.update()
        if self.average is not None:
            self.average.update(self.at.step)
        self.pending.append(Pending(self.at.step, loss, norm, weight, self.at.tokens, learning_rate, self._seconds()))

    def _backward(self, step: Step, weight: float) -> torch.Tensor:
        """Gradients of all pieces; the sum of this process's losses. Gradients become a mean over the shares."""
        scale = self.place.shares / weight
        total = torch.zeros((), device=self.place.device)
        for number, piece in enumerate(step.pieces):
            with self.place.without_sync(self.learner.wrapped, number + 1 < len(step.pieces)):
                with self._autocast():
                    loss = self.objective(self.learner.wrapped, self._on_device(piece))
                self.learner.backward(loss * scale)
            total += loss.detach()
        return total

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.place.device, non_blocking=True) for name, tensor in batch.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.settings.precision]
        if dtype is None:
            return nullcontext()
        # weights in parts come and go: their casts would stay till the end of the forward pass
        return torch.autocast(self.place.device.type, dtype, cache_enabled=self.place.sharded is None)

    # -- what is due ------------------------------------------------------------------------------------------------

    def _state_is_due(self) -> bool:
        """After the step that comes now."""
        every = self.settings.checkpoint_every
        if every is not None and every.seconds is None:
            return (self.at.step + 1) % max(1, round(every.amount)) == 0
        wanted = pause(self.write_cost) if every is None else every.seconds or 0.0
        return time.monotonic() - self.written >= wanted

    def _look_is_due(self) -> bool:
        return time.monotonic() - self.looked >= LOOK_S

    def _patience_is_over(self) -> bool:
        stopping = self.settings.early_stopping
        return stopping is not None and self.at.waited >= stopping.patience

    def _seconds(self) -> float:
        return self.at.seconds + time.monotonic() - self.started

    # -- losses and scores ------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Read the losses of the steps since the last look, check and log them. The one place that waits."""
        if not self.pending:
            return
        losses = self.place.total(torch.stack([p.loss for p in self.pending]).tolist())
        norms = torch.stack([p.norm for p in self.pending]).tolist()
        now = time.monotonic()
        rate_ = (self.at.tokens - self.logged_tokens) / max(now - self.looked, 1e-9)
        for entry, loss, norm in zip(self.pending, losses, norms, strict=True):
            self._log(entry, loss / entry.weight, norm, rate_)
        self.journal.show(
            self.at.step, f"step {self.at.step}/{self.steps} · loss {self.at.loss:.3f} · {rate_:,.0f} tokens/s"
        )
        self.pending.clear()
        self.looked, self.logged_tokens = now, self.at.tokens

    def _log(self, entry: Pending, loss: float, norm: float, tokens_per_s: float) -> None:
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.learner.scaler.is_enabled()):
            raise TrainingError(
                f"step {entry.step}: expected a finite loss and gradient, found loss {loss:g}, gradient norm {norm:g}; "
                f"look at the learning rate ({entry.learning_rate:g}), the precision ({self.settings.precision}), the "
                f"weights it started from and rows {(entry.step - 1) * self.settings.batch_size} to "
                f"{entry.step * self.settings.batch_size - 1}; the state before it is kept"
            )
        self.at.loss = loss
        self.journal.write(
            {
                "step": entry.step,
                "loss": loss,
                "tokens": entry.tokens,
                "tokens_per_s": tokens_per_s,
                "learning_rate": entry.learning_rate,
                "grad_norm": norm if math.isfinite(norm) else None,
                "seconds": entry.seconds,
            }
        )

    def _measure(self) -> None:
        """The dev loss, where there are dev rows, and the checkpoint to keep, where one is."""
        if self.dev is not None and len(self.dev):
            self.at.dev = {"dev_loss": self._dev_loss(self.dev)}
            if self.average is not None:
                with self.average.applied():
                    self.at.dev["ema_dev_loss"] = self._dev_loss(self.dev)
            self.journal.write({"step": self.at.step, **self.at.dev})
            self._compare(self.at.dev["dev_loss"])
        self._keep()
        self.place.wait()
        self.looked = time.monotonic()

    def _keep(self) -> None:
        """The checkpoint of this step, if it is to be kept."""
        save, keep = self.save, self.settings.keep
        if save is None or not (keep.last or keep.best):
            return
        with self.place.plain():
            if self.kept is not None:
                self.kept.add(self.at.step, self.at.dev.get("dev_loss"), lambda folder: save(self.model, folder))

    def _compare(self, score: float) -> None:
        stopping = self.settings.early_stopping
        margin = stopping.min_delta if stopping else 0.0
        if self.at.best is None or score < self.at.best - margin:
            self.at.best, self.at.best_step, self.at.waited = score, self.at.step, 0
        else:
            self.at.waited += 1

    @torch.no_grad()
    def _dev_loss(self, dev: Rows) -> float:
        """Loss a unit over the first rows of `dev` (always the same), each read once by one of the processes.

        Every process reads as many batches, since weights in parts are put together by all; some the first once more,
        which does not count.
        """
        size = self.settings.batch_size // (self.settings.accumulate * self.place.shares)
        count = min(len(dev), self.dev_rows)
        own = range(self.place.share * size, count, size * self.place.shares)
        most = len(range(0, count, size * self.place.shares))
        starts = [*own, *[0] * (most - len(own))]
        plans = ([range(start, min(start + size, count))] for start in starts)
        total, weight = torch.zeros((), dtype=torch.float64, device=self.place.device), 0.0
        self.model.eval()
        with Ahead(dev, plans, self.objective, self.place.device.type == "cuda") as steps:
            for number, step in enumerate(steps):
                with self._autocast():
                    found = self.objective(self.model, self._on_device(step.pieces[0]))
                if number < len(own):
                    total += found
                    weight += step.weight
        self.model.train()
        self.place.settle()
        loss, units = self.place.total([float(total), weight])
        if units == 0:
            raise TrainingError(
                "expected dev rows with labels, found all of them masked; look at the dev split's format"
            )
        return loss / units

    def finish(self) -> TrainResult:
        """Save the average, leave the model as plain as it came, and sum up."""
        if self.average is not None and self.save is not None:
            with self.average.applied(), self.place.plain():
                if self.place.main:
                    with atomic_folder(self.out / "checkpoints" / "ema") as part:
                        self.save(self.model, part)
        self.place.wait()
        self.place.release()
        if self.settings.gradient_checkpointing:
            self.model.activation_checkpointing_disable()  # type: ignore[operator]
        self.model.eval()
        metrics = {"loss": self.at.loss, **self.at.dev, "seconds": self._seconds()}
        if self.at.best is not None:
            metrics |= {"best_dev_loss": self.at.best, "best_step": self.at.best_step}
        return TrainResult(metrics, self.at.step, self.at.tokens)


def row_tokens(rows: Rows) -> float:
    """Mean number of tokens in the first rows; exact where all rows have one length."""
    count = min(64, len(rows))
    return tokens_in(rows.collate([rows[index] for index in range(count)])) / count
