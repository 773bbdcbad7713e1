"""The recipe that checks a piece of advice: the method, its neighbours and full tuning, each at two learning rates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.advise.candidates import Candidate
from graft.evaluate.settings import Generation

RATES = {"full": 1e-4, "few": 1e-3}
"""Guesses of the lower of two learning rates; few weights want about ten times what all want (see the evidence)."""
STEP = 3
"""The second learning rate is so many times the first."""
HEADS = {"labelled": "classification", "tagged": "tagging", "spans": "spans"}
"""The head that learns from data of a format."""


def recipe(
    model: Path,
    data: Mapping[str, Any],
    name: str,
    kind: str,
    architecture: str,
    training: Mapping[str, Any],
    shown: Sequence[Candidate],
    reads: int | None = None,
) -> dict[str, Any]:
    """A recipe as plain values. `name`: the data set of `data` that is learned; `kind`: its format; `reads`: tokens
    that the model can read, prompt and answer together, where it says so."""
    models: dict[str, Any] = {"base": {"load": str(model.resolve())}}
    if any(candidate.packed for candidate in shown):
        models["packed"] = {"quantize": {"from": "base", "bits": 4}}
    for candidate in shown:
        rate = RATES["full" if candidate.method == "full" else "few"]
        models[candidate.method] = {"tune": node(candidate, training, rate)}
        models[f"{candidate.method}_fast"] = {"tune": node(candidate, training, round(STEP * rate, 12))}
    tuned = [each for each in models if each not in ("base", "packed")]
    return {
        "family": re.sub(r"[^A-Za-z0-9_-]", "-", f"check-{model.resolve().name}"),
        "seed": 0,
        "data": dict(data),
        "models": models,
        "evaluate": measures(name, kind, architecture, tuned, reads),
    }


def node(candidate: Candidate, training: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """What stands below `tune:`."""
    base = {"from": "packed" if candidate.packed else "base"}
    how = {"method": {candidate.method: dict(candidate.options)}, "learning_rate": rate}
    return {**base, **training, **how, **candidate.changes}


def learned(name: str, kind: str, architecture: str) -> dict[str, Any]:
    """What of `tune:` says what is learned: by a head, where the data are for one and the architecture has it."""
    if kind in HEADS and architecture != "encoder-decoder":
        return {"tasks": {"task": {"data": name, "head": HEADS[kind]}}}
    return {"data": name}


def measures(name: str, kind: str, architecture: str, tuned: Sequence[str], reads: int | None) -> list[dict[str, Any]]:
    """What is measured on the test split: what the data ask for, and how well text is predicted."""
    on = {"on": [f"{name}.test"]}
    if kind in HEADS:
        return [{"measure": HEADS[kind], **on, "models": list(tuned)}]
    usual = Generation.model_fields["max_tokens"].default
    room = {} if reads is None or reads >= 2 * usual else {"max_tokens": max(reads // 2, 1)}
    written = {"measure": "generation", **on, "metrics": ["token_f1", "chrf"], **room}
    read = {"measure": "bits_per_byte", **on}
    return [written] * (kind in ("completion", "pairs")) + [read] * (architecture == "decoder")
