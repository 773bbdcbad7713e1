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
from pathlib import Path

from _side_by_side import json_of
from _training_peer import model
from _trainings import compare, ours

HERE = Path(__file__).resolve().parent
PEER = HERE / ".venv-trl" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ours", action="store_true", help="one run of ours, for the script itself")
    parser.add_argument("--bare-only", action="store_true", help="leave Trainer and SFTTrainer out")
    given = parser.parse_args()
    if given.ours:
        print(json.dumps(ours(model(), given.steps, given.batch)))
        return
    peer, size = str(HERE / "_training_peer.py"), [str(given.steps), str(given.batch)]
    commands = {
        "graft": [sys.executable, __file__, "--ours", "--steps", size[0], "--batch", size[1]],
        "bare PyTorch": [sys.executable, peer, "bare", *size],
    }
    if not given.bare_only:
        commands |= {
            f"transformers.Trainer {version('transformers')}": [str(PEER), peer, "trainer", *size],
            f"trl.SFTTrainer {version('trl')}": [str(PEER), peer, "sft", *size],
        }
    parameters = sum(p.numel() for p in model().parameters()) / 1e6
    what = f"training, Llama {parameters:.1f}M, length 512, batch {given.batch}, fp32"
    compare(what, commands, given.repeats, ["graft", "torch", "transformers", "accelerate"])


def version(package: str) -> str:
    """Version of a package in the peers' environment."""
    code = f"import importlib.metadata, json; print(json.dumps({{'v': importlib.metadata.version({package!r})}}))"
    return str(json_of([PEER, "-c", code])["v"])


if __name__ == "__main__":
    main()
