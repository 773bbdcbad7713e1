"""Trackers that are told of a training beside its log: TensorBoard, Weights & Biases, MLflow, trackio.

accelerate speaks with them. What they print goes to stderr: stdout is for answers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

from graft.errors import RequestError
from graft.train.place import Place
from graft.verb import Job

OFFLINE = {"wandb": "WANDB_MODE=offline", "mlflow": "MLFLOW_TRACKING_URI=sqlite:///mlflow.db"}
"""What lets a tracker keep all on this machine; the others do where nothing else is said."""
NAMED = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}
"""How each takes the name of a run."""


@dataclass(frozen=True)
class Title:
    """What trackers call a training: `run`, among the others of `project`."""

    project: str
    run: str

    @classmethod
    def of(cls, job: Job) -> Title:
        """The node's name, in the project of the run's folder, or of the folder that a single model will stand in."""
        home = (job.target or job.out).resolve().parent
        return cls((home.parent if home.name == "models" else home).name or "graft", job.name)


class Trackers:
    """The trackers of a place, told from now on; nobody where there are none."""

    def __init__(self, place: Place, title: Title, settings: Mapping[str, Any], step: int):
        self.accelerator = place.accelerator
        self.names = [str(tracker) for tracker in place.accelerator.log_with]
        if not self.names:
            return
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        given: dict[str, dict[str, Any]] = {name: {NAMED[name]: title.run} for name in self.names if name in NAMED}
        if step:
            # what a killed run told TensorBoard after this step is not shown twice
            given["tensorboard"] = {"purge_step": step + 1}
        try:
            with redirect_stdout(sys.stderr):
                self.accelerator.init_trackers(title.project, config=plain, init_kwargs=given)
        except Exception as error:
            # each has errors of its own: not logged in, no server, a folder that is not there
            ways = " and ".join(OFFLINE[name] for name in self.names if name in OFFLINE)
            hint = f"; to keep all on this machine set {ways}" if ways else ""
            raise RequestError(f"{', '.join(self.names)} (`track`) cannot begin: {error}{hint}") from error

    def tell(self, entry: Mapping[str, float | None]) -> None:
        """The numbers of an entry of the log, under the same names."""
        if self.names:
            numbers = {name: value for name, value in entry.items() if name != "step"}
            with redirect_stdout(sys.stderr):
                self.accelerator.log(numbers, step=int(entry["step"] or 0))

    def close(self) -> None:
        """End the run."""
        if not self.names:
            return
        with redirect_stdout(sys.stderr):
            self.accelerator.end_training()
            if "trackio" in self.names and self.accelerator.is_main_process:
                import trackio

                # else it ends the run once more when the process ends, and says so on stdout
                with suppress(RuntimeError):
                    trackio.finish()
