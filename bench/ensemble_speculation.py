"""Greedy decoding of an ensemble folder: speculative against plain `generate`, alternating in one run.

python bench/ensemble_speculation.py runs/domains/models/panel novelist --prompt "It was"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import graft
from _side_by_side import Side, measure, report, timed
from graft.models import load_tokenizer


def main() -> None:
    """One row; the text of both ways is compared first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ensemble", type=Path)
    parser.add_argument("draft")
    parser.add_argument("--prompt", default="It was")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model = graft.load(args.ensemble)
    ids = load_tokenizer(args.ensemble)(args.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]

    def plain() -> object:
        return model.generate(ids, do_sample=False, max_new_tokens=args.tokens, eos_token_id=None)

    def drafted() -> object:
        return model.speculate(ids, args.draft, max_new_tokens=args.tokens)

    found = model.speculate(ids, args.draft, max_new_tokens=args.tokens)
    if not found.sequences.equal(plain()):
        raise SystemExit("the texts differ")
    what = f"speculation, {len(model.members)} members, kept {sum(found.kept)} of {sum(found.drafted)} drafts"
    sides = [Side("speculative", timed(drafted)), Side("generate", timed(plain))]
    report(what, measure(sides, args.repeats), unit="s", packages=["graft", "torch", "transformers"])


if __name__ == "__main__":
    main()
