"""Writes folders that look like those of a run, with scores that the test chooses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from graft.evaluate.results import VERSION

FAMILY = {
    "base": ("pretrain", []),
    "coder": ("tune", ["base"]),
    "writer": ("tune", ["base"]),
    "soup": ("merge", ["coder", "writer"]),
    "duo": ("ensemble", ["coder", "writer"]),
}
SCORES = {
    "code.test": {"base": 2.41, "coder": 2.12, "writer": 2.77, "soup": 2.31, "duo": 2.17},
    "prose.test": {"base": 2.63, "coder": 2.98, "writer": 2.36, "soup": 2.52, "duo": 2.42},
    "mixed.test": {"base": 2.52, "coder": 2.54, "writer": 2.57, "soup": 2.41, "duo": 2.29},
}
RATES = {"base": 21000.0, "coder": 20800.0, "writer": 21300.0, "soup": 20900.0, "duo": 10600.0}


def manifest(folder: Path, name: str, verb: str, parents: Iterable[str], **more: Any) -> None:
    """`models/<name>/graft.json` with what the report reads, and a training log for what was trained."""
    target = folder / "models" / name
    target.mkdir(parents=True)
    value = {
        "format": 1,
        "name": name,
        "verb": verb,
        "verb_version": 1,
        "key": f"key-{name}",
        "parents": [{"name": p, "path": f"../{p}", "hash": f"hash-{p}"} for p in parents],
        "settings": {"method": "full" if verb == "tune" else "linear", "learning_rate": 0.001},
        "seed": 0,
        "versions": {"graft": "0.1.0", "torch": "2.13.0"},
        "code": {"commit": "0123456789abcdef", "dirty": False},
        "data": [{"name": "mixed", "split": "train", "fingerprint": "f" * 64}],
        "hash": f"hash-{name}",
        "initialisation": "i" * 64,
        "vocabulary": "v" * 64,
        "architecture": "decoder",
        "parameters": 3_100_000,
        "metrics": {},
        "notes": {},
        "forced": [],
        "created": "2026-01-01T12:00:00+00:00",
        "seconds": 61.5,
    }
    (target / "graft.json").write_text(json.dumps(value | more))
    if verb in ("pretrain", "tune"):
        (target / "log.jsonl").write_text("\n".join(json.dumps(line) for line in training(verb)))


def training(verb: str, steps: int = 60) -> Iterable[dict[str, Any]]:
    """A log of `steps` steps whose loss falls from 8 (or 3.2 for a tuned model) with a wave on it."""
    start, end = (8.0, 3.0) if verb == "pretrain" else (3.2, 2.6)
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-step / (steps / 6)) + 0.05 * math.sin(step * 2.3)
        yield {"step": step, "loss": loss, "tokens": step * 8192, "tokens_per_s": 20000.0, "learning_rate": 1e-3}
        if step % 20 == 0:
            yield {"step": step, "dev_loss": loss + 0.05}


def score(model: str, on: str, value: float, **more: Any) -> dict[str, Any]:
    """A score row with an interval of ± 0.03."""
    row = {
        "kind": "score",
        "model": model,
        "model_hash": f"hash-{model}",
        "measure": "bits_per_byte",
        "task": "",
        "metric": "bits_per_byte",
        "on": on,
        "value": value,
        "low": value - 0.03,
        "high": value + 0.03,
        "confidence": 0.95,
        "n": 400,
        "unit": "bits/byte",
        "higher_is_better": False,
        "task_version": "1",
        "seed": 0,
        "settings": {"window": 512},
        "items": f"items/{model}.jsonl",
        "cost": {
            "tokens_per_s": RATES.get(model, 20000.0),
            "seconds": 3.0,
            "peak_memory_bytes": 4.1e8 if model == "duo" else 2.6e8,
            "disk_bytes": 24_800_000 if model == "duo" else 12_400_000,
        },
        "versions": {"graft": "0.1.0"},
        "evaluation": VERSION,
        "time": "2026-01-01T12:30:00+00:00",
    }
    return row | more


def comparison(a: str, b: str, on: str, difference: float, p: float, **more: Any) -> dict[str, Any]:
    """A comparison row: a minus b, with an interval of ± 0.02."""
    row = {
        "kind": "comparison",
        "models": [a, b],
        "model_hashes": [f"hash-{a}", f"hash-{b}"],
        "measure": "bits_per_byte",
        "task": "",
        "metric": "bits_per_byte",
        "on": on,
        "difference": difference,
        "low": difference - 0.02,
        "high": difference + 0.02,
        "p": p,
        "test": "paired_bootstrap",
        "n": 400,
        "evaluation": VERSION,
    }
    return row | more


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`results.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def family(folder: Path) -> Path:
    """A whole run: five models, three columns, the combinations compared with their parents."""
    for name, (verb, parents) in FAMILY.items():
        manifest(folder, name, verb, parents)
    rows = [score(model, on, value) for on, by_model in SCORES.items() for model, value in by_model.items()]
    for on, values in SCORES.items():
        for name, (_, parents) in FAMILY.items():
            pairs = parents if len(parents) > 1 else []
            rows += [comparison(name, p, on, values[name] - values[p], 0.0004) for p in pairs]
    write_rows(folder, rows)
    return folder
