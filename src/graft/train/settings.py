"""How to train: the settings that every training verb shares. Light: pydantic only."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_serializer, model_validator

from graft.errors import MissingExtra
from graft.settings import Settings, Tokens
from graft.train.account import no_account
from graft.train.parallel import Parallel

_TOKENS: TypeAdapter[int] = TypeAdapter(Tokens)
_AMOUNT = re.compile(r"\s*([\d_.]+)\s*([a-z]+)\s*", re.IGNORECASE)

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Budget(Settings):
    """How long to train, written `2M tokens` (or `2M`), `500 steps` or `2 epochs`."""

    amount: float = Field(gt=0)
    unit: Literal["tokens", "steps", "epochs"]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"amount": value, "unit": "tokens"}
        if not isinstance(value, str):
            return value
        found = _AMOUNT.fullmatch(value)
        unit = f"{found[2].lower().removesuffix('s')}s" if found else "tokens"
        try:
            amount = _number(found[1]) if found and unit in ("steps", "epochs") else _TOKENS.validate_python(value)
        except (ValueError, ValidationError):
            raise ValueError(f"expected a budget such as 2M tokens, 500 steps or 2 epochs, found {value!r}") from None
        return {"amount": amount, "unit": unit if unit in ("steps", "epochs") else "tokens"}

    @model_validator(mode="after")
    def _whole(self) -> Budget:
        if self.unit != "epochs" and self.amount != int(self.amount):
            raise ValueError(f"expected a whole number of {self.unit}, found {self.amount:g}")
        return self

    @model_serializer
    def _write(self) -> str:
        return str(self)

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"

    def steps(self, rows: int, batch_size: int, row_tokens: float) -> int:
        """Optimizer steps (at least 1) for an epoch of `rows` rows of `row_tokens` tokens each, `batch_size` a step."""
        if self.unit == "steps":
            return int(self.amount)
        wanted = self.amount * rows if self.unit == "epochs" else self.amount / row_tokens
        return max(1, math.ceil(wanted / batch_size - 1e-9))


class Interval(Settings):
    """A stretch of training, written `100 steps` (or `100`), `30 seconds` or `5 minutes`."""

    amount: float = Field(gt=0)
    unit: Literal["steps", "seconds", "minutes"]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"amount": value, "unit": "steps"}
        if not isinstance(value, str):
            return value
        found = _AMOUNT.fullmatch(value)
        unit = f"{found[2].lower().removesuffix('s')}s" if found else ""
        try:
            return {"amount": _number(found[1]) if found and _is_interval(unit) else float("nope"), "unit": unit}
        except ValueError:
            expected = "100 steps, 30 seconds or 5 minutes"
            raise ValueError(f"expected an interval such as {expected}, found {value!r}") from None

    @model_serializer
    def _write(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"

    @property
    def seconds(self) -> float | None:
        """The interval in seconds; None where it is counted in steps."""
        return {"steps": None, "seconds": self.amount, "minutes": 60 * self.amount}[self.unit]


def _is_interval(unit: str) -> bool:
    return unit in ("steps", "seconds", "minutes")


def _number(text: str) -> float:
    return float(text.replace("_", ""))


class Keep(Settings):
    """Checkpoints kept beside the model (complete Hugging Face folders), made wherever the dev score is measured."""

    last: int = Field(default=0, ge=0, description="how many of the newest checkpoints stay")
    best: int = Field(default=0, ge=0, description="how many of those with the lowest dev loss stay")


class EarlyStopping(Settings):
    """Stop when the dev loss no longer falls."""

    patience: int = Field(
        default=3, ge=1, description="measurements without a better dev loss after which training stops"
    )
    min_delta: float = Field(default=0.0, ge=0, description="how much lower (nats a unit of the loss) counts as better")


class TrainSettings(Settings):
    """How to train. Verbs inherit these, so that they stand directly in the verb's settings."""

    placement: ClassVar[frozenset[str]] = frozenset({"parallel"})
    silent: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "track"})

    budget: Budget = Field(
        default_factory=lambda: Budget(amount=1, unit="epochs"),
        description="how long to train: `2M tokens`, `500 steps` or `2 epochs`",
    )
    batch_size: int = Field(default=32, ge=1, description="rows in an optimizer step, all processes together")
    accumulate: int = Field(
        default=1,
        ge=1,
        description="pieces a step's rows are read in, one after the other: less memory, the same result",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="learning rate at its peak")
    schedule: Literal["linear", "cosine", "wsd", "constant"] = Field(
        default="linear",
        description="how the learning rate goes after the warmup: straight down, down a half cosine, "
        "level and then straight down (warmup, stable, decay), or level",
    )
    warmup: float = Field(default=0.05, ge=0, description="steps of linear warmup; below 1, their share of all steps")
    decay: float = Field(
        default=0.2, gt=0, description="steps of the decay at the end of wsd; 1 or below, their share of all"
    )
    final_rate: float = Field(
        default=0.0, ge=0, le=1, description="learning rate at the end, as a share of the peak (not for constant)"
    )
    weight_decay: float = Field(
        0.01, ge=0, description="AdamW weight decay of matrices; biases, norms, embeddings none"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="AdamW with moments of 32 bits or of 8 (Dettmers et al. 2022); `paged_…`: moments that give way to "
        "the computer's memory where that of a CUDA device is full. All but `adamw` need bitsandbytes",
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW decay rates of the two moments")
    clip: float | None = Field(
        default=1.0, gt=0, description="largest global norm of the gradient; null for no clipping"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="number format of forward and backward; weights and optimizer stay in fp32"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in backward: less memory, slower"
    )
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights (at first lower), kept as checkpoints/ema",
    )
    keep: Keep = Field(default_factory=lambda: Keep(), description="which checkpoints on the way are kept")
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between measurements of the dev loss (on a fifth as many rows as these steps read, 64 at "
        "least); null for ten in the whole training",
    )
    early_stopping: EarlyStopping | None = Field(default=None, description="stop when the dev loss no longer falls")
    checkpoint_every: Interval | None = Field(
        default=None,
        description="how often the state to resume from is written: `100 steps`, `5 minutes`; "
        "null for as often as it costs under half a percent of the time (under 2 % where that would be less often than "
        "every ten minutes), every 20 seconds at most",
    )
    bootstrap: int | None = Field(
        default=None,
        ge=0,
        description="train on a resample of the documents, as many as there are, drawn with replacement by this seed "
        "(bagging); the manifest says how often each was drawn",
    )
    parallel: Parallel | None = Field(
        default=None,
        description="how several processes train the model together: `ddp`, `fsdp`, `zero`, or with options "
        "`{method: fsdp, devices: 2}`; null for `ddp`",
    )
    track: list[Tracker] = Field(default_factory=list, description="trackers that get the log as well")

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"expected betas from 0 to below 1, found {betas}")
        return betas

    @field_validator("optimizer")
    @classmethod
    def _at_hand(cls, optimizer: str) -> str:
        if optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(str(MissingExtra("bitsandbytes", "quantised", f"the optimizer {optimizer}")))
        return optimizer

    @field_validator("track")
    @classmethod
    def _installed(cls, track: list[Tracker]) -> list[Tracker]:
        for name in track:
            if importlib.util.find_spec(name) is None:
                raise ValueError(str(MissingExtra(name, name, f"the tracker {name}")))
        if "wandb" in track and (lost := no_account()):
            raise ValueError(lost)
        return track

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"expected batch_size to be a multiple of accumulate, found {self.batch_size} and {self.accumulate}"
            )
        if self.parallel is not None and self.parallel.method != "ddp":
            self._check_spread(self.parallel.method)
        if self.parallel is not None and self.parallel.devices and (wrong := self.uneven(self.parallel.devices)):
            raise ValueError(wrong)
        return self

    def uneven(self, processes: int) -> str:
        """Why the rows of a step cannot be shared out to so many processes; empty where they can."""
        alike = self.parallel.tensor if self.parallel is not None else 1
        shares = 1 if self.all_read_alike else processes // alike
        if self.batch_size % (self.accumulate * shares) == 0:
            return ""
        return (
            f"expected batch_size to be a multiple of accumulate times processes ({self.accumulate} × {shares}), "
            f"found {self.batch_size}"
        )

    @property
    def all_read_alike(self) -> bool:
        """Whether all processes read the same rows, which are shared out otherwise."""
        return False

    def _check_spread(self, method: str) -> None:
        """Raises ValueError for what weights in parts cannot be trained with."""
        if self.compile:
            raise ValueError(f"expected `compile: false` with `parallel: {method}`, found true; ddp compiles")
        if self.precision == "fp16":
            raise ValueError(f"expected precision fp32 or bf16 with `parallel: {method}`, found fp16")
        possible = ("adamw", "adamw_8bit") if method == "fsdp" else ("adamw",)
        if self.optimizer not in possible:
            words = " or ".join(possible)
            raise ValueError(f"expected `optimizer: {words}` with `parallel: {method}`, found {self.optimizer}")
        if self.ema is not None and method == "zero":
            raise ValueError(
                "expected `ema` with `parallel: ddp` or `fsdp`, found zero, which holds weights its own way"
            )

    def wanted_dev(self) -> Mapping[str, str]:
        """Data sets, as they are named, that need a dev split, each with what is said where it has none."""
        return {}

    def wanted_labels(self) -> Sequence[tuple[str, str, Sequence[str], str]]:
        """(task, data set as it is named, its labels, kind of head) of the tasks that name their labels."""
        return []


def no_dev(task: str) -> str:
    """What is said of a task without dev data in a learned mixture."""
    return (
        f"expected dev data for the task {task}, towards which weights are learned, found none: give its data a dev "
        "split, or name tasks that have one in `mixing.learn.for`"
    )


def strange(name: str, labels: Sequence[str], found: Iterable[str]) -> str:
    """Which label in the data of a task is not among those that it names; empty where all are."""
    unknown = next((label for label in found if label not in labels), None)
    return "" if unknown is None else f"task {name}: expected labels among {', '.join(labels)}, found {unknown!r}"
