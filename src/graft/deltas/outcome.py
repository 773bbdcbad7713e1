"""What held-out data say: the models, their mean, their ensemble, and the straight lines between them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.merge.barrier import Line, line_between

if TYPE_CHECKING:
    from graft.evaluate.judge import Judge

MEAN, ENSEMBLE = "mean of the weights", "ensemble"


@dataclass(frozen=True)
class Outcome:
    """A measure of every model, of the mean of their weights and of their linear ensemble; lines between pairs."""

    metric: str
    higher_is_better: bool
    scores: Mapping[str, float | None]
    lines: Mapping[str, Line]
    """By `first – second`."""

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values, barriers included."""
        return asdict(self) | {"barriers": {name: line.barrier for name, line in self.lines.items()}}


def outcome(
    models: Mapping[str, Path], judge: Judge, *, base: Path | None = None, points: int = 5, device: str | None = None
) -> Outcome:
    """Measures all of them; the merge and the ensemble are made in a temporary folder. Raises CannotCombine where
    there is no mean or no ensemble of these models."""
    from graft.one import make_one

    named = {**({"base": base} if base is not None else {}), **models}
    with tempfile.TemporaryDirectory() as room:
        paths = [str(path.resolve()) for path in models.values()]
        forced = {"models": paths, "method": "linear", "force": True}
        named[MEAN] = make_one("merge", Path(room) / "mean", forced, device=device)
        if len(models) > 1:
            members = {"combine": "linear", "members": paths}
            named[ENSEMBLE] = make_one("ensemble", Path(room) / "ensemble", members, device=device)
        scores = {name: _value(folder, judge, device) for name, folder in named.items()}
    lines = {
        f"{a} – {b}": line_between(models[a], models[b], judge, points, device) for a, b in combinations(models, 2)
    }
    return Outcome(judge.metric, judge.higher_is_better, scores, lines)


def _value(folder: Path, judge: Judge, device: str | None) -> float | None:
    from graft import models

    return judge.value(models.load(folder, device=device), models.load_tokenizer(folder))
