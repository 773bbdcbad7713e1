"""A measure as one number: what a search or a choice between models is led by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graft.errors import RequestError, RunError
from graft.evaluate.items import Subject, score, subjects
from graft.evaluate.scorer import Scorer
from graft.evaluate.settings import Measure

LOSSES = ("bits_per_byte", "perplexity")
"""Measures of which less is better."""


@dataclass(frozen=True)
class Judge:
    """A measure with its items read once, for many models."""

    subjects: list[Subject]
    metric: str

    @classmethod
    def of(cls, measure: Measure, sets: Mapping[str, Any], root: Path, metric: str | None = None) -> Judge:
        """Reads the items. `sets` are the settings of all data sets; `metric` None: the measure's first.

        Raises DataError for data that is empty or of the wrong format, RequestError for a metric that is not computed.
        """
        found = subjects(measure, sets, root)
        known = found[0].task.metrics if found[0].task else [found[0].name]
        if metric is not None and metric not in known:
            raise RequestError(f"expected a metric of {found[0].name} ({', '.join(known)}), found {metric!r}")
        return cls(found, metric or known[0])

    @property
    def higher_is_better(self) -> bool:
        """Which way is up."""
        return self.metric not in LOSSES

    @property
    def content(self) -> list[list[Any]]:
        """What was read: (data set, fingerprint, versions) of each, JSON-ready."""
        return [[subject.on, subject.fingerprint, subject.version, *subject.drawn] for subject in self.subjects]

    def value(self, model: Any, tokenizer: Any) -> float | None:
        """The mean over the data sets of the metric, as `graft.evaluate` computes it; None where it is not finite."""
        scorer = Scorer(model, tokenizer)
        try:
            found = [self._one(subject, scorer) for subject in self.subjects]
        except RunError:
            # what the scorer says of weights that give no numbers
            return None
        return float(np.mean(found)) if np.isfinite(found).all() else None

    def _one(self, subject: Subject, scorer: Scorer) -> float:
        chosen = next(scored for scored in score(subject, scorer) if scored.metric.name == self.metric)
        return float(chosen.metric.value(chosen.statistics.sum(0, keepdims=True))[0])
