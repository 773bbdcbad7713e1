"""The one training loop: a model, rows and an objective go in; trained weights, a log and kept checkpoints come out.

One step: read the rows of the step (made ahead by a thread) → agree on the weight of the whole step → forward and
backward of each piece, scaled by that weight → clip → AdamW → average. Nothing in it waits for the device; losses are
read a few at a time. The state to resume from is written now and then into `scratch`; a killed run goes on from there
and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from graft.allocator import memory_kept
from graft.data.rows import Rows
from graft.disk import atomic_folder
from graft.errors import RequestError, TrainingError
from graft.products import quick_layers
from graft.progress import say
from graft.train.batches import Ahead, Batch, Step, make_step, spans, tokens_in
from graft.train.companions import companions_of
from graft.train.dev_loss import dev_loss
from graft.train.interrupt import Interrupt
from graft.train.journal import Journal
from graft.train.kept import Kept
from graft.train.learner import Learner
from graft.train.looks import Looks, Pending
from graft.train.place import Place
from graft.train.position import Position
from graft.train.random_state import random_state, seed_all, set_random_state
from graft.train.schedule import rate
from graft.train.settings import TrainSettings
from graft.train.shards import whole_on_main
from graft.train.state import WRITTEN_A_SECOND, forget_states, pause, read_state, write_state
from graft.train.trackers import Title

Save = Callable[[Any, Path], None]
"""Writes a model as a complete Hugging Face folder into a folder that exists and is empty."""

DEV_SHARE, DEV_ROWS = 0.2, 64
"""A dev loss reads this share of the rows that are trained on between two of them, but so many rows at least: it costs
a few percent of the time, however large the dev split is."""


class Objective(Protocol):
    """What is made small. One that moves the weights while it is called, and back, says so: its `moves` is true."""

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
    title: Title | None = None,
) -> TrainResult:
    """Train `model` in place; go on where a killed run with the same `scratch` stood.

    Parameters that require a gradient are trained, in fp32. The gradient is that of the sum of the losses over the
    step's rows divided by their weight, however the rows are cut into pieces and spread over processes. `dev` gives
    the dev loss (mean over all units of its first rows). `save` is needed for kept checkpoints and the moving average.
    Writes `out/log.jsonl` and `out/checkpoints/`; only the main process writes. `before_step(step)` is called before
    step 0, 1, …, in every process; what it changes must be a buffer of the model, which a resumed training has again.
    `title`: what trackers call the training; by the name of `out`, if not given.

    Raises RequestError for settings that do not fit what is given, TrainingError where labels are all masked or the
    loss is not finite, KeyboardInterrupt after Ctrl-C (with the state saved).
    """
    place = Place(device, settings.track, Path(out), settings.parallel, getattr(objective, "moves", False))
    _check_request(settings, rows, dev, save, place.shares)
    title = title or Title("graft", Path(out).resolve().name)
    training = Training(
        model, rows, objective, settings, Path(out), Path(scratch), seed, dev, save, place, title, before_step
    )
    with Interrupt() as interrupt, memory_kept(), quick_layers():
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
        title: Title,
        before_step: Callable[[int], None] | None = None,
    ):
        self.before_step, self.title = before_step, title
        self.rows, self.dev, self.objective, self.settings = rows, dev, objective, settings
        self.out, self.scratch, self.seed, self.save, self.place = out, scratch, seed, save, place
        self.model = self._prepare(model)
        self.steps = settings.budget.steps(len(rows), settings.batch_size, row_tokens(rows))
        spread = place.parallel.method != "ddp"
        self.learner = Learner(model, settings, place, companions_of(model, self.steps, spread))
        self.average = self.learner.average
        self.every = settings.evaluate_every or max(1, self.steps // 10)
        self.dev_rows = max(DEV_ROWS, int(DEV_SHARE * self.every * settings.batch_size))
        self.at = Position()
        self.kept_before: dict[int, float | None] = {}
        self.kept: Kept | None = None
        self.journal: Journal
        self.looks: Looks

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
        settings = {k: v for k, v in self.settings.content().items() if k not in self.settings.silent}
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
            seed_all(self.seed + self.place.group)
            self._check_labels()
            self.learner.begin()
            return
        self.learner.begin(state.tensors)
        self.learner.scaler.load_state_dict(state.facts["scaler"])
        self.at = Position(**state.facts["at"])
        if self.place.main:
            say(f"going on from step {self.at.step:,} of {self.steps:,}")
        self.kept_before = {int(step): score for step, score in state.facts["kept"].items()}
        states = state.facts["random"]
        if len(states) == self.place.world:
            set_random_state(states[self.place.rank], self.place.device)
        else:
            seed_all(self.seed + self.at.step * 1000 + self.place.group)

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
        self.started = self.written = time.monotonic()
        self.write_cost = self.learner.bytes / WRITTEN_A_SECOND
        keep = self.settings.keep
        self.kept = Kept(self.out / "checkpoints", keep, self.kept_before, self.at.step) if self.place.main else None
        rows, pin = self.rows, self.place.device.type == "cuda"
        with (
            Journal(self.place, self.out, self.at.step, self.steps, self.settings.plain(), self.title) as self.journal,
            Ahead(rows, self._plans(), self.objective, pin) as steps,
        ):
            scaled = self.learner.scaler.is_enabled()
            self.looks = Looks(self.place, self.journal, self.at, self.steps, self.settings, scaled)
            for step in steps:
                self._advance(step, interrupt)
                if self._patience_is_over():
                    break
            self.looks.look()

    def _plans(self) -> Iterator[list[range]]:
        steps = range(self.at.step, self.at.step if self._patience_is_over() else self.steps)
        shape = (self.settings.batch_size, self.settings.accumulate, self.place.share, self.place.shares)
        return (spans(step, *shape) for step in steps)

    def _advance(self, step: Step, interrupt: Interrupt) -> None:
        """One step and what is due behind it. All processes agree on what that is."""
        main = self.place.main
        weight, tokens, asked, state_due, look_due = self.place.total(
            [step.weight, step.tokens, interrupt.asked, main and self._state_is_due(), main and self.looks.due()]
        )
        self._learn(step, weight, int(tokens))
        measure_due = self.at.step % self.every == 0 or self.at.step == self.steps
        if asked or state_due or look_due or measure_due:
            self.looks.look()
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
        norm = self.learner.update(self.at.step)
        if self.average is not None:
            self.average.update(self.at.step)
        self.looks.pending.append(
            Pending(self.at.step, loss, norm, weight, self.at.tokens, learning_rate, self._seconds())
        )

    def _backward(self, step: Step, weight: float) -> torch.Tensor:
        """Gradients of all pieces; the sum of this process's losses. Gradients become a mean over the shares."""
        scale = self.place.shares / weight
        total = torch.zeros((), device=self.place.device)
        for number, piece in enumerate(step.pieces):
            with self.place.without_sync(self.learner.wrapped, number + 1 < len(step.pieces)):
                with self.place.autocast(self.settings.precision):
                    loss = self.objective(self.learner.wrapped, self.place.take(piece))
                self.learner.backward(loss * scale)
            total += loss.detach()
        return total

    # -- what is due ------------------------------------------------------------------------------------------------

    def _state_is_due(self) -> bool:
        """After the step that comes now."""
        every = self.settings.checkpoint_every
        if every is not None and every.seconds is None:
            return (self.at.step + 1) % max(1, round(every.amount)) == 0
        wanted = pause(self.write_cost) if every is None else every.seconds or 0.0
        return time.monotonic() - self.written >= wanted

    def _patience_is_over(self) -> bool:
        stopping = self.settings.early_stopping
        return stopping is not None and self.at.waited >= stopping.patience

    def _seconds(self) -> float:
        return self.at.seconds + time.monotonic() - self.started

    # -- losses and scores ------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """The dev loss, where there are dev rows, and the checkpoint to keep, where one is."""
        if self.dev is not None and len(self.dev):
            self.at.dev = {"dev_loss": self._dev_loss(self.dev)}
            if self.average is not None:
                with self.average.applied():
                    self.at.dev["ema_dev_loss"] = self._dev_loss(self.dev)
            self.journal.write({"step": self.at.step, **self.at.dev})
            self.at.compare(self.at.dev["dev_loss"], self.settings.early_stopping)
        self._keep()
        self.place.wait()
        self.looks.rest()

    def _keep(self) -> None:
        """The checkpoint of this step, if it is to be kept."""
        save, keep = self.save, self.settings.keep
        if save is None or not (keep.last or keep.best):
            return
        with self.place.plain():
            if self.kept is not None:
                self.kept.add(self.at.step, self.at.dev.get("dev_loss"), lambda folder: save(self.model, folder))

    def _dev_loss(self, dev: Rows) -> float:
        return dev_loss(self.model, dev, self.dev_rows, self.objective, self.settings, self.place)

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
