"""Decoding by a mixture whose gate leaves a large member out where it gets too little, beside the plain mixture.

The gate is made by hand: it sees the small member and gives the large one no weight at a chosen share of the tokens.

OMP_NUM_THREADS=4 python bench/ensemble_gated.py [--needed 0 0.25 0.5 1] [--tokens 64] [--repeats 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from _side_by_side import Side, measure, report, timed
from graft.ensemble.gate import Gate
from graft.ensemble.model import EnsembleConfig, EnsembleForCausalLM, ensemble_of

VOCABULARY = 8192


def member(seed: int, layers: int) -> PreTrainedModel:
    """A random Llama; time does not depend on what the weights are."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, bos_token_id=1, eos_token_id=2, **sizes)
    return LlamaForCausalLM(config).eval()


class ByTurns(Gate):
    """Needs the large member at the share `needed` of the steps, spread evenly."""

    needed, step = 0.0, 0

    def decide(self, told: object) -> torch.Tensor:
        """Weights `[1, 1, 2]` of the small and the large member."""
        self.step += 1
        wanted = int(self.step * self.needed) > int((self.step - 1) * self.needed)
        return torch.tensor([[[0.5, 0.5] if wanted else [1.0, 0.0]]])


def gated(small: PreTrainedModel, large: PreTrainedModel, needed: float) -> EnsembleForCausalLM:
    """The mixture whose gate needs `large` at so many of the tokens."""
    plain = ensemble_of({"small": small, "large": large})
    gate = Gate(2, inputs=2, looks_at=[0])
    config = EnsembleConfig(plain.config.members, "linear", [0.5, 0.5], {}, gate.plain())
    made = EnsembleForCausalLM(config, [small, large]).eval()
    made.gate = ByTurns(2, inputs=2, looks_at=[0])
    made.gate.needed = needed
    return made


def decoding(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> Callable[[], float]:
    """A run in which the model decodes the prompt by as many tokens."""
    given = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    return timed(lambda: model.generate(prompt, attention_mask=mask, **given))


def main() -> None:
    """One row for each share, beside what small + share · large would be of the plain mixture's time."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--needed", type=float, nargs="+", default=[0.0, 0.25, 0.5, 1.0])
    words.add_argument("--tokens", type=int, default=64)
    words.add_argument("--repeats", type=int, default=5)
    asked = words.parse_args()
    small, large = member(1, 1), member(2, 8)
    prompt = torch.randint(3, VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(0))
    for model in (small, large):
        decoding(model, prompt, 8)()
    alone = [decoding(model, prompt, asked.tokens)() for model in (small, large)]
    plain = ensemble_of({"small": small, "large": large})
    for needed in asked.needed:
        expected = (alone[0] + needed * alone[1]) / sum(alone)
        sides = [
            Side("gated", decoding(gated(small, large, needed), prompt, asked.tokens)),
            Side("plain mixture", decoding(plain, prompt, asked.tokens)),
        ]
        what = (
            f"decoding, a large member needed at {needed:.0%} of {asked.tokens} tokens (members used: {expected:.2f})"
        )
        report(what, measure(sides, asked.repeats), unit="s", packages=["graft", "torch", "transformers"])


if __name__ == "__main__":
    main()
