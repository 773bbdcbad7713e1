"""Decoding by a mixture of four members whose gate leaves members out, beside the plain mixture: time by members used.

The gate is made by hand: it looks at the first member and needs each of the others at a share of the tokens, drawn by
chance, so that 1, 2, 3 or 4 members are needed on average. A member that was left out first reads what it has missed,
in one piece: that is in the time.

OMP_NUM_THREADS=4 python bench/ensemble_gated.py [--models FOLDER ...] [--members 4] [--used 1 2 3 4] [--tokens 64]
    [--repeats 3]

Without models the members have random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from _side_by_side import Side, measure, report, timed
from ensemble_decoding import members
from graft.ensemble.gate import Gate
from graft.ensemble.model import EnsembleConfig, EnsembleForCausalLM, ensemble_of


class ByChance(Gate):
    """Needs each member but the first at the share `needed` of the steps; the same ones in every run."""

    needed = 0.0

    def begin(self) -> None:
        """Forget what was drawn."""
        self.chance, self.steps, self.runs = torch.Generator().manual_seed(0), 0, 0

    def decide(self, told: object) -> torch.Tensor:
        """Equal weights `[1, 1, members]` of the members that are needed."""
        wanted = torch.rand(self.outer.out_features, generator=self.chance) < self.needed
        wanted[0] = True
        self.steps, self.runs = self.steps + 1, self.runs + int(wanted.sum())
        return (wanted / wanted.sum())[None, None]


def gated(models: Sequence[PreTrainedModel], used: float) -> EnsembleForCausalLM:
    """The mixture whose gate needs so many of the members on average."""
    named = {str(place): model for place, model in enumerate(models)}
    gate = ByChance(len(named), inputs=2, looks_at=[0])
    shares = [1 / len(named)] * len(named)
    config = EnsembleConfig(ensemble_of(named).config.members, "linear", shares, {}, gate.plain())
    made = EnsembleForCausalLM(config, list(models)).eval()
    made.gate, gate.needed = gate, (used - 1) / (len(named) - 1)
    return made


def decoding(model: Any, prompt: torch.Tensor, tokens: int) -> Callable[[], None]:
    """The model decodes the prompt by as many tokens."""
    given = {"max_new_tokens": tokens, "eos_token_id": None, "do_sample": False, "pad_token_id": 0}

    def run() -> None:
        if isinstance(model.gate, ByChance):
            model.gate.begin()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **given)

    return run


def main() -> None:
    """A row for each number of members used, with the share of the plain mixture's time that it should take."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--models", type=Path, nargs="+", default=[], help="folders of members with one tokenizer")
    words.add_argument("--members", type=int, default=4)
    words.add_argument("--used", type=float, nargs="+", default=[1, 2, 3, 4])
    words.add_argument("--tokens", type=int, default=64)
    words.add_argument("--repeats", type=int, default=3)
    asked = words.parse_args()
    made = members(asked.models, asked.members)
    prompt = torch.randint(3, made[0].config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    plain = ensemble_of({str(place): model for place, model in enumerate(made)})
    for used in asked.used:
        model = gated(made, used)
        sides = [
            Side("gated", timed(decoding(model, prompt, asked.tokens))),
            Side("plain mixture", timed(decoding(plain, prompt, asked.tokens))),
        ]
        found = measure(sides, asked.repeats)
        mean = model.gate.runs / model.gate.steps
        what = f"gated decoding, {mean:.2f} of {asked.members} members used at each of {asked.tokens} tokens"
        what += f" (in proportion: {mean / asked.members:.3f} of the time)"
        report(what, found, unit="s", packages=["graft", "torch", "transformers"])


if __name__ == "__main__":
    main()
