"""What the scripts that ask whether combining helps share: samples of data, scores with paired tests, tables."""

from __future__ import annotations

import datetime
import json
import random
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _side_by_side import machine, versions
from graft import data
from graft.data.corpus import text_of
from graft.evaluate import metrics, statistics
from graft.evaluate.results import Results

Columns = Mapping[str, Sequence[str]]
"""A column's heading and the data sets or tasks in it; several count alike, each as one."""


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """A JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def sample(settings: Mapping[str, Any], root: Path, split: str, count: int, characters: int) -> list[dict[str, str]]:
    """`count` pieces of so many characters, drawn from the whole split of a data set of texts; scraps left out."""
    corpus = data.open_corpus({"text": data.parse(dict(settings))}, "text", root)
    texts = [text_of(record) for record in corpus.records(split)]
    pieces = [text[start : start + characters] for text in texts for start in range(0, len(text), characters)]
    long = [piece for piece in pieces if len(piece) > characters // 4]
    return [{"text": piece} for piece in random.Random(0).sample(long, min(count, len(long)))]


@dataclass(frozen=True)
class Difference:
    """A score less another on the same items: value, 95 % interval, p of the paired bootstrap."""

    value: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        p = "< 0.001" if self.p < 0.001 else f"= {self.p:.2g}"
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f}), p {p}".replace("-", "−")


class Scores:
    """The scores behind a run by one metric, resampled over documents or sentences."""

    def __init__(self, folder: Path, metric: metrics.Metric = metrics.BITS_PER_BYTE):
        self.metric = metric
        results = Results(folder)
        rows = [row for row in results.rows if row["kind"] == "score" and row["metric"] == metric.name]
        read = {(row["model"], row["on"]): results.read_items(row) for row in rows}
        self.sums = {key: items[1] for key, items in read.items() if items is not None}

    def interval(self, model: str, places: Sequence[str]) -> tuple[float, float, float]:
        """(value, low, high)."""
        score, items = self._score(model, places)
        return float(score(np.ones((1, items)))[0]), *statistics.bootstrap(score, items, 0)

    def value(self, model: str, places: Sequence[str]) -> float:
        """The score itself."""
        return self.interval(model, places)[0]

    def difference(self, model: str, other: str, places: Sequence[str]) -> Difference:
        """Of two models on the same items."""
        (first, items), (second, _) = self._score(model, places), self._score(other, places)
        low, high, p = statistics.paired(*statistics.redrawn([first, second], items, 0), items)
        return Difference(self.value(model, places) - self.value(other, places), low, high, p)

    def best(self, models: Sequence[str], places: Sequence[str]) -> str:
        """The model that scores best."""
        return (max if self.metric.higher_is_better else min)(models, key=lambda model: self.value(model, places))

    def _score(self, model: str, places: Sequence[str]) -> tuple[statistics.Score, int]:
        sums = pooled([self.sums[model, place] for place in places])
        return lambda counts: self.metric.value(counts @ sums), len(sums)


def pooled(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Statistics `[items, k]` of several data sets as one, in which each counts alike however large it is."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([part / part[:, -1].sum() for part in parts])


def score_table(scores: Scores, models: Sequence[str], columns: Columns) -> list[str]:
    """Markdown: value ± the longer side of its interval, the best of a column in bold."""
    lines = [f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    best = {column: scores.best(models, places) for column, places in columns.items()}
    for model in models:
        cells = [_cell(scores.interval(model, places), best[column] == model) for column, places in columns.items()]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def _cell(interval: tuple[float, float, float], best: bool) -> str:
    value, low, high = interval
    text = f"**{value:.3f}**" if best else f"{value:.3f}"
    return f"{text} ± {max(value - low, high - value):.3f}"


def difference_table(scores: Scores, models: Sequence[str], singles: Sequence[str], columns: Columns) -> list[str]:
    """Markdown: each model less the best single one of the column, which the heading names."""
    best = {column: scores.best(singles, places) for column, places in columns.items()}
    heads = [f"{column}, less {best[column]}" for column in columns]
    lines = [f"| model | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for model in models:
        cells = [str(scores.difference(model, best[column], places)) for column, places in columns.items()]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def source_line() -> str:
    """The command, the machine, the versions and the date."""
    command = shlex.join(["python", *sys.argv])
    used = versions(["graft", "torch", "transformers"])
    return f"`{command}`; {machine()}; {used}; {datetime.date.today().isoformat()}."
