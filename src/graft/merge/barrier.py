"""The loss along the straight line between two models: a hill between two valleys, or none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft import models
from graft.progress import Progress

if TYPE_CHECKING:
    from graft.evaluate.judge import Judge
    from graft.verb import Job

LINE = "line.json"


@dataclass(frozen=True)
class Line:
    """`values[i]` is the measure of the model `(1 − shares[i]) · first + shares[i] · second`; None: not a number."""

    shares: Sequence[float]
    values: Sequence[float | None]
    higher_is_better: bool = False

    @property
    def barrier(self) -> float | None:
        """How far the line is worse than between its ends, at most (Frankle et al. 2020, arXiv:1912.05671, section 2).

        None where some model on it gives no number.
        """
        known = [value for value in self.values if value is not None]
        if len(known) < len(self.values):
            return None
        sign = -1 if self.higher_is_better else 1
        ends = [(1 - share) * known[0] + share * known[-1] for share in self.shares]
        return max(sign * (value - end) for value, end in zip(known, ends, strict=True))


@torch.no_grad()
def line_between(first: Path, second: Path, judge: Judge, points: int, device: str | None = None) -> Line:
    """Measures `points` models on the line, its ends among them, in float32; two models are held, none is written."""
    moving = models.load(first, dtype="float32", device=device)
    tokenizer = models.load_tokenizer(first)
    start = {name: value.clone() for name, value in moving.state_dict().items()}
    end = models.load(second, dtype="float32", device=device).state_dict()
    shares = [place / (points - 1) for place in range(points)]
    values = []
    with Progress("measuring the line", points, "models") as progress:
        for share in shares:
            for name, value in moving.state_dict().items():
                if value.is_floating_point():
                    torch.lerp(start[name], end[name], share, out=value)
            values.append(judge.value(moving, tokenizer))
            progress.advance(1)
    return Line(shares, values, judge.higher_is_better)


def barriers(job: Job) -> dict[str, Any]:
    """For the manifest: the lines between each two models of a merge that asks for them, with their barriers.

    A line that was measured before a kill is not measured again.
    """
    from graft.evaluate.judge import Judge
    from graft.merge._kept import kept, made_of
    from graft.merge.settings import MergeSettings

    settings = job.settings
    assert isinstance(settings, MergeSettings)
    assert settings.barrier is not None
    asked = settings.barrier
    judge = Judge.of(asked.entry(), job.data, job.root, asked.metric)
    found = []
    for i, j in combinations(range(len(settings.names)), 2):
        pair = [settings.names[i], settings.names[j]]

        def make(folder: Path, first: Path = job.models[pair[0]], second: Path = job.models[pair[1]]) -> None:
            line = line_between(first, second, judge, asked.points, job.device)
            plain = {"shares": list(line.shares), "values": list(line.values), "barrier": line.barrier}
            (folder / LINE).write_text(json.dumps(plain))

        made = made_of(job, settings, pair, barrier=asked.plain())
        measured = json.loads((kept(job, f"barriers/{i}-{j}", made, make) / LINE).read_text())
        found.append({"between": pair, **measured})
    return {"metric": judge.metric, "on": asked.data, "lines": found}
