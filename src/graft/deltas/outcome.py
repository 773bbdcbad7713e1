"""What held-out data say: the models, merges of them, their ensemble, and the straight lines between them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.deltas.measure import free_name
from graft.errors import RequestError

if TYPE_CHECKING:
    from graft.evaluate.judge import Judge
    from graft.merge.barrier import Line

MEAN, ENSEMBLE = "mean of the weights", "ensemble"


@dataclass(frozen=True)
class Outcome:
    """A measure of every model, of a merge of them and of their linear ensemble; lines between pairs."""

    metric: str
    higher_is_better: bool
    scores: Mapping[str, float | None]
    lines: Mapping[str, Line]
    """By `first – second`."""

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values, barriers included."""
        return asdict(self) | {"barriers": {name: line.barrier for name, line in self.lines.items()}}


def outcome(
    models: Mapping[str, Path],
    judge: Judge,
    *,
    base: Path | None = None,
    merge: Mapping[str, Any] | None = None,
    sets: Mapping[str, Any] | None = None,
    root: Path = Path(),
    points: int = 5,
    device: str | None = None,
) -> Outcome:
    """Measures all of them; the merges and the ensemble are made in a temporary folder.

    `merge`: settings (`merge_of`) of a merge that is measured beside the mean of the weights; `sets` are the settings
    of data that it reads, seen from `root`. Raises CannotCombine where there is no mean, no such merge or no ensemble
    of these models.
    """
    from graft.merge.barrier import line_between
    from graft.one import make_one

    named = {**({free_name("base", models): base} if base is not None else {}), **models}
    with tempfile.TemporaryDirectory() as room:
        paths = [str(path.resolve()) for path in models.values()]
        forced = {"models": paths, "method": "linear", "anyway": True}
        named[MEAN] = make_one("merge", Path(room) / "mean", forced, device=device)
        if merge is not None:
            out = Path(room) / "merge"
            named[str(merge["method"])] = make_one("merge", out, merge, data=sets, root=root, device=device)
        if len(models) > 1:
            members = {"combine": "linear", "members": paths}
            named[ENSEMBLE] = make_one("ensemble", Path(room) / "ensemble", members, device=device)
        scores = {name: _value(folder, judge, device) for name, folder in named.items()}
    lines = {
        f"{a} – {b}": line_between(models[a], models[b], judge, points, device) for a, b in combinations(models, 2)
    }
    return Outcome(judge.metric, judge.higher_is_better, scores, lines)


def merge_of(models: Mapping[str, Path], base: Path | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a merge of these models, from what is said of it: its `method` at least. A method that cannot do
    without a base is given it. Raises SettingsError for what is wrong with them, RequestError without a method.
    """
    from graft.merge import VERB

    if "method" not in asked:
        raise RequestError(f"expected a method for the merge (`method`, --method), found {', '.join(asked) or 'none'}")
    field = VERB.types_of(asked)[str(asked["method"])].model_fields.get("base")
    below = {"base": str(base.resolve())} if base is not None and field is not None and field.is_required() else {}
    settings = {"models": [str(path.resolve()) for path in models.values()], "anyway": True, **below, **asked}
    VERB.parse(settings)
    return settings


def _value(folder: Path, judge: Judge, device: str | None) -> float | None:
    from graft import models

    return judge.value(models.load(folder, device=device), models.load_tokenizer(folder))
