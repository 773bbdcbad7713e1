"""Whole trainings beside those of peers: ours as a verb runs it, each in a process of its own, on equal work."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from _side_by_side import Measured, in_turn, json_of, report
from _training_peer import LEARNING_RATE, Clock, tokens

SHOWN = {"tokens/s": ("tokens_per_s", 1.0), "CPU s for 1,000 tokens": ("cpu_s_per_1000_tokens", 1.0),
         "GiB at the peak": ("peak_bytes", 2.0**-30)}  # fmt: skip
"""What a row of the table says → the figure it is made of, times what."""


def ours(net: Any, steps: int, batch: int) -> dict[str, Any]:
    """Figures of graft's loop with its log and its states, as a verb runs it."""
    from graft.data.alone import IGNORED
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
            loss = super().__call__(model, batch)
            clock.first_loss = clock.first_loss or loss.item() / self.weight(batch)
            return loss

    ids = tokens(steps * batch)
    labels = ids.copy()
    labels[:, 0] = IGNORED  # nothing predicts it
    rows = ListRows([{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)], shuffle=False)
    given = {"budget": f"{steps} steps", "batch_size": batch, "learning_rate": LEARNING_RATE, "warmup": 0}
    with tempfile.TemporaryDirectory() as folder:
        out, scratch = Path(folder) / "out", Path(folder) / "scratch"
        train(net, rows, Ticking(), parse(TrainSettings, given), out, scratch=scratch, seed=0)
    # a tick is the start of a step: the first step warms up, and what comes after the last start is not a whole step
    clock.stamps.pop(0)
    return clock.figures(batch, net)


NEAR = 1e-3
"""How far first losses may lie apart. All read the same first rows with the same weights: what is left is the order in
which float32 is summed, some 1e-6 of a loss of 8; other rows give one that is 5e-3 and more away."""


def compare(what: str, commands: Mapping[str, Sequence[str]], repeats: int, packages: Sequence[str]) -> None:
    """Rows of the table: tokens/s, CPU time and peak memory of each command's training, taken in turn.

    Raises SystemExit where they are not at the same work.
    """
    runs = {name: lambda command=command: json_of(command) for name, command in commands.items()}
    found = in_turn(runs, repeats, warmup=0)
    check_work({name: figures[0]["work"] for name, figures in found.items()})
    for unit, (key, factor) in SHOWN.items():
        sides = [Measured(name, tuple(one[key] * factor for one in figures)) for name, figures in found.items()]
        report(what, sides, unit, packages)


def check_work(works: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises SystemExit unless all train as many weights of one type in as many threads, from one loss."""
    (first, wanted), *others = works.items()
    for name, work in others:
        if not same(work, wanted):
            raise SystemExit(f"expected the same work, found {first} at {wanted} and {name} at {work}")


def same(work: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two are at the same work; a loss that was not told, or is no number, is that of no other."""
    losses = work["first_loss"], wanted["first_loss"]
    if None in losses or any(work[key] != wanted[key] for key in ("trained", "type", "threads")):
        return False
    return bool(abs(losses[0] - losses[1]) <= NEAR)  # not so of NaN
