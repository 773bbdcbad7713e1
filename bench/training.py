"""The training loop beside a bare PyTorch loop, transformers' Trainer and TRL's SFTTrainer: tokens/s, fp32.

    sh bench/venv_trl.sh
    OMP_NUM_THREADS=4 python bench/training.py [--steps 20] [--batch 8] [--repeats 5]

Every run is a process of its own; the first step of each warms up and is not counted. graft writes its log, and states
to resume from as often as they cost under half a percent of the time (every minute or so at this size, so that short
runs have none); the peers write nothing in the steps that are counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from _side_by_side import Side, json_of, measure, report
from _training_peer import LEARNING_RATE, Clock, model, tokens

HERE = Path(__file__).resolve().parent
PEER = HERE / ".venv-trl" / "bin" / "python"


def ours(steps: int, batch: int) -> float:
    """Tokens a second of graft's loop with its log and its state for resuming, as a verb runs it."""
    from graft.data.rows import ListRows
    from graft.settings import parse
    from graft.train.loop import train
    from graft.train.losses import TokenLoss
    from graft.train.settings import TrainSettings

    clock = Clock()

    class Ticking(TokenLoss):
        """The loss that verbs train with; the start of a step's forward pass is a tick."""

        def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            clock.tick()
            return super().__call__(model, batch)

    rows = ListRows([{"input_ids": row, "labels": row} for row in tokens(steps * batch)], shuffle=False)
    given = {"budget": f"{steps} steps", "batch_size": batch, "learning_rate": LEARNING_RATE, "warmup": 0}
    settings = parse(TrainSettings, given)
    with tempfile.TemporaryDirectory() as folder:
        out, scratch = Path(folder) / "out", Path(folder) / "scratch"
        train(model(), rows, Ticking(), settings, out, scratch=scratch, seed=0)
    # a tick is the start of a step: the first step warms up, and what comes after the last start is not a whole step
    clock.stamps.pop(0)
    return clock.rate(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ours", action="store_true", help="one run of ours, for the script itself")
    parser.add_argument("--bare-only", action="store_true", help="leave Trainer and SFTTrainer out")
    given = parser.parse_args()
    if given.ours:
        print(json.dumps({"tokens_per_s": ours(given.steps, given.batch)}))
        return
    size = [str(given.steps), str(given.batch)]

    def side(name: str, python: str | Path, *command: str) -> Side:
        return Side(name, lambda: json_of([python, *command])["tokens_per_s"])

    peer = str(HERE / "_training_peer.py")
    sides = [
        side("graft", sys.executable, __file__, "--ours", "--steps", size[0], "--batch", size[1]),
        side("bare PyTorch", sys.executable, peer, "bare", *size),
    ]
    if not given.bare_only:
        sides += [
            side(f"transformers.Trainer {version('transformers')}", PEER, peer, "trainer", *size),
            side(f"trl.SFTTrainer {version('trl')}", PEER, peer, "sft", *size),
        ]
    parameters = sum(p.numel() for p in model().parameters()) / 1e6
    what = f"training, Llama {parameters:.1f}M, length 512, batch {given.batch}, fp32"
    report(
        what,
        measure(sides, given.repeats, warmup=0 if given.bare_only else 1),
        "tokens/s",
        ["graft", "torch", "transformers", "accelerate"],
    )


def version(package: str) -> str:
    """Version of a package in the peers' environment."""
    code = f"import importlib.metadata, json; print(json.dumps({{'v': importlib.metadata.version({package!r})}}))"
    return str(json_of([PEER, "-c", code])["v"])


if __name__ == "__main__":
    main()
