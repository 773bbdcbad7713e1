"""A verb for tests: grows a small vector in steps, from a seed or from its parents' vectors; as exact as a real one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from graft.errors import TrainingError
from graft.settings import DataRef, ModelRef, Settings, parse
from graft.verb import Estimate, Facts, Verb


class Grow(Settings):
    parents: list[ModelRef] = []
    data: DataRef | None = None
    steps: int = 3
    pause_s: float = 0.0
    fails: bool = False
    kind: str = "decoder"
    journal: str | None = None


class GrowVerb(Verb[Grow]):
    name = "grow"
    summary = "Grow a vector."

    def types(self):
        return {"grow": Grow}

    def parse(self, raw, path=()):
        return parse(Grow, raw or {}, path)

    def content(self, settings):
        return settings.plain() | {"journal": None, "pause_s": None, "fails": None}

    def check(self, settings, models):
        kinds = {models[p].architecture for p in settings.parents}
        return [f"parents of one kind can be grown together, found {sorted(kinds)}"] if len(kinds) > 1 else []

    def facts(self, settings, models, key):
        return Facts(settings.kind, f"of:{key}", "none", 4, 16)

    def estimate(self, settings, models):
        return Estimate(4, 1000, 2000, float(settings.steps))

    def run(self, job) -> dict[str, Any]:
        settings, state = job.settings, job.scratch / "state.json"
        assert isinstance(settings, Grow)
        values, done = _start(job), 0
        if state.is_file():
            held = json.loads(state.read_text())
            values, done = np.array(held["values"], np.float32), held["done"]
        for step in range(done, settings.steps):
            if settings.fails:
                raise TrainingError("the loss is NaN")
            values = np.tanh(values * np.float32(1.5) + np.float32(step + job.seed))
            time.sleep(settings.pause_s)
            if settings.journal:
                with open(settings.journal, "a") as journal:
                    journal.write(f"{job.name} {step}\n")
            part = job.scratch / "state.part"
            part.write_text(json.dumps({"values": values.tolist(), "done": step + 1}))
            part.replace(state)
        save_file({"vector": values}, job.out / "model.safetensors")
        (job.out / "config.json").write_text('{"architectures": ["Vector"]}')
        return {"largest": float(values.max()), "notes": {"steps": settings.steps}}


def _start(job) -> np.ndarray:
    vectors = [load_file(Path(folder) / "model.safetensors")["vector"] for folder in job.models.values()]
    return np.mean(vectors, axis=0, dtype=np.float32) if vectors else np.arange(4, dtype=np.float32)


VERB = GrowVerb()
