"""Decoding by an ensemble of 2 and 4 members beside the sum of the members' own `generate`: seconds, greedy, fp32.

OMP_NUM_THREADS=4 python bench/ensemble_decoding.py [--models FOLDER ...] [--members 2 4] [--batch 1 8] [--tokens 64]
    [--repeats 5]

Without models the members have random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import graft
from _side_by_side import Side, measure, report, timed
from graft.ensemble.model import ensemble_of

VOCABULARY = 8192


def member(seed: int) -> PreTrainedModel:
    """A random Llama of about 25M parameters; time does not depend on what the weights are."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def members(folders: Sequence[Path], count: int) -> list[PreTrainedModel]:
    """So many models: the first of these folders', or random ones where there are none."""
    if folders and len(folders) < count:
        raise SystemExit(f"expected {count} folders of models, found {len(folders)}")
    return [graft.load(folder) for folder in folders[:count]] if folders else [member(seed) for seed in range(count)]


def decoding(models: Sequence[PreTrainedModel], prompt: torch.Tensor, tokens: int) -> Callable[[], None]:
    """Each model decodes the prompt by as many tokens, one after the other."""

    def run() -> None:
        for model in models:
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                eos_token_id=None,
            )

    return run


def main() -> None:
    """One row for each number of members and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="folders of members with one tokenizer")
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for count in args.members:
        models = members(args.models, count)
        ensemble = ensemble_of({str(place): model for place, model in enumerate(models)})
        for batch in args.batch:
            prompt = torch.randint(3, models[0].config.vocab_size, (batch, 64))
            sides = [
                Side("ensemble", timed(decoding([ensemble], prompt, args.tokens))),
                Side("sum of members", timed(decoding(models, prompt, args.tokens))),
            ]
            what = f"greedy decoding, {count} members, batch {batch}, {args.tokens} tokens"
            report(what, measure(sides, args.repeats), unit="s", packages=["graft", "torch", "transformers"])


if __name__ == "__main__":
    main()
