"""Every error graft raises on purpose.

    GraftError                 exit code 1
    ├── RequestError           exit code 2: what was asked for is wrong; said before any work starts
    │   ├── SettingsError      settings that do not parse: misspelt key, wrong type, value out of range
    │   ├── RecipeError        one or more problems in a recipe, each with its line
    │   ├── UnknownName        a verb, method, source, measure or node that does not exist
    │   ├── CannotCombine      models whose weights or predictions may not be combined
    │   ├── DataError          a data file that is missing, empty, binary or wrongly formatted
    │   ├── MissingExtra       an optional package that this request needs
    │   └── Locked             another process works on this folder
    └── RunError               the request was right and something went wrong while it ran
        ├── Unfinished         some of it failed, all else was done: models not made, scores not taken
        ├── CheckpointError    weights that are corrupt, truncated, missing, NaN or Inf
        ├── TrainingError      a loss that is not finite; labels that an objective masks all
        └── DiskError          no space, no permission

A message says what was expected, what was found and what to do.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class GraftError(Exception):
    """Base of all errors raised by graft. `exit_code` is what the command line exits with."""

    exit_code = 1


class RequestError(GraftError):
    """The request was wrong. Raised before work starts wherever that is possible."""

    exit_code = 2


class SettingsError(RequestError):
    """Settings that do not parse; `problems` holds each with its place."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class RecipeError(SettingsError):
    """A recipe that cannot run; `problems` holds everything found, in the order of the lines."""


class UnknownName(RequestError):
    """A name that does not exist. The message shows the nearest right name and lists the valid ones."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]):
        self.kind, self.name, self.valid = kind, name, sorted(valid)
        super().__init__(f"unknown {kind} {name!r}{nearest(name, self.valid)}; there are: {', '.join(self.valid)}")


class CannotCombine(RequestError):
    """Models that may not be combined this way. The message names what would work instead."""


class DataError(RequestError):
    """A data file or data set that cannot be used; the message names the file and, where there is one, the line."""


class MissingExtra(RequestError):
    """An optional package is needed. The message is the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package}: pip install 'graft[{extra}]'")


class Locked(RequestError):
    """Another process works on this folder."""


class RunError(GraftError):
    """The request was right and something went wrong while it ran."""


@dataclass(frozen=True)
class Failure:
    """Why one of many was not done: the message, the exit code of its error, and the trace for those who debug."""

    message: str
    exit_code: int
    trace: str


def attempt(make: Callable[[], T]) -> T | Failure:
    """What `make` gives, or why it gives nothing."""
    try:
        return make()
    except GraftError as error:
        return Failure(str(error), error.exit_code, traceback.format_exc())
    except Exception as error:  # noqa: BLE001  (whatever goes wrong in one, the others go on and all is reported)
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return Failure(without_memory(error) or words, RunError.exit_code, traceback.format_exc())


def without_memory(error: Exception) -> str:
    """What is said where memory was not to be had, on a processor or an accelerator; empty for any other error."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if not kinds & {"MemoryError", "OutOfMemoryError"} and "can't allocate memory" not in str(error):
        return ""
    found = str(error).partition("\n")[0] or "no more to be had"
    return (
        f"expected more memory than there is ({found}): smaller batches, a shorter length or gradient checkpointing "
        "need less; `graft plan` says how much a recipe needs"
    )


class Unfinished(RunError):
    """Some of what was asked for failed, all else was done: `failures` holds why, by what failed, `done` the rest."""

    def __init__(self, failures: Mapping[str, Failure], done: Any, more: Sequence[str] = ()):
        self.failures, self.done = dict(failures), done
        super().__init__("\n".join([*(f"{name}: {failure.message}" for name, failure in failures.items()), *more]))
        self.exit_code = min(failure.exit_code for failure in failures.values())
        self.answer: Mapping[str, Any] = {}
        """What a command says of `done` as JSON, beside the failure."""


class ScoresFailed(Unfinished):
    """One or more scores could not be taken; `failures` holds why, by measure, model and data set."""


class CheckpointError(RunError):
    """Weights that are corrupt, truncated, missing, of the wrong shape, NaN or Inf; names the file and the tensor."""


class TrainingError(RunError):
    """Training that cannot go on: the loss is NaN, every label is masked."""


class DiskError(RunError):
    """The disk is full, or a file or folder may not be read or written. Nothing that was there before is lost."""


def forbidden(error: PermissionError) -> DiskError:
    """What the system refused, by the name of the file. Raises `error` itself where it names none."""
    if error.filename is None:
        raise error
    return DiskError(f"{error.filename}: permission denied; change its permissions or name another")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with settings: where (a path such as `models.soup.merge.density`), the line in the file, what."""

    path: tuple[str | int, ...]
    message: str
    line: int | None = None

    def __str__(self) -> str:
        place = ".".join(str(p) for p in self.path)
        line = f"line {self.line}: " if self.line is not None else ""
        return f"{line}{place}: {self.message}" if place else f"{line}{self.message}"


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is close to `name`; None where there is none."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)), None)


def nearest(name: str, valid: Iterable[str]) -> str:
    """`" (did you mean 'density'?)"` where a valid name is close to `name`, else an empty string."""
    close = closest(name, valid)
    return f" (did you mean {close!r}?)" if close else ""
