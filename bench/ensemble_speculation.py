"""Greedy decoding of an ensemble: speculative against plain `generate`, alternating in one run; the text is the same.

OMP_NUM_THREADS=4 python bench/ensemble_speculation.py [--models FOLDER ...] [--batch 1 8] [--tokens 64] [--repeats 5]

Without models it trains a small family (a base, tuned on code and on prose) into bench/work/speculation, once. Rows are
of the first two members, of all of them, and of two members with random weights, which agree by chance only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import graft
from _side_by_side import Side, measure, report, timed
from graft.ensemble.model import EnsembleForCausalLM, ensemble_of
from graft.models import load_tokenizer

FAMILY = """
family: speculation
data:
  code:  {source: python-library, keep: code, limit: 400}
  prose: {source: python-library, keep: docstrings, limit: 4000}
  mixed: {mix: {code: 0.5, prose: 0.5}}
models:
  base:   {pretrain: {data: mixed, size: 2M, length: 128, budget: 800K tokens}}
  coder:  {tune: {from: base, data: code, budget: 200K tokens}}
  writer: {tune: {from: base, data: prose, budget: 200K tokens}}
"""
WORK = Path(__file__).parent / "work" / "speculation"
PROMPTS = [
    "It was a dark night and the old man",
    "The patient was given a dose of",
    "I would like to book a table for",
    "def read_file(path):\n    with open",
    "She looked at him and said that she",
    "Return the list of all files that",
    "Can you find me a cheap hotel in",
    "import os\n\nclass Reader:\n    def __init__(self",
]


def trained() -> list[Path]:
    """Folders of the small family, trained where they are not there yet."""
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "recipe.yaml").write_text(FAMILY)
    graft.run(WORK / "recipe.yaml", WORK / "run")
    return [WORK / "run" / "models" / name for name in ("coder", "writer", "base")]


def strangers(models: Mapping[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """Models of the same shapes with random weights."""
    made = {}
    for seed, (name, model) in enumerate(models.items()):
        torch.manual_seed(seed)
        made[f"random {name}"] = AutoModelForCausalLM.from_config(model.config).eval()
    return made


def ways(
    model: EnsembleForCausalLM, prompts: Mapping[str, torch.Tensor], draft: str | None, tokens: int
) -> tuple[Callable[[], Any], Callable[[], torch.Tensor]]:
    """Speculation and plain decoding of the prompts, without an end token."""
    given = {"max_new_tokens": tokens, "pad_token_id": 0, "attention_mask": prompts["attention_mask"]}
    ids = prompts["input_ids"]
    return (
        lambda: model.speculate(ids, draft, **given),
        lambda: model.generate(ids, do_sample=False, eos_token_id=None, **given),
    )


def compare(what: str, model: EnsembleForCausalLM, prompts: Any, asked: argparse.Namespace, draft: str | None) -> None:
    """Print a row; the texts of both ways are compared first."""
    drafted, plain = ways(model, prompts, draft, asked.tokens)
    found = drafted()
    if not torch.equal(found.sequences, plain()):
        raise SystemExit(f"{what}: the texts differ")
    sides = [Side("speculative", timed(drafted)), Side("generate", timed(plain))]
    rows = len(prompts["input_ids"])
    kept = f"kept {found.kept / found.drafted:.0%} of {found.drafted} drafts" if found.drafted else "no drafts"
    what = f"{what}, batch {rows}, {asked.tokens} tokens, {kept}"
    report(what, measure(sides, asked.repeats), unit="s", packages=["graft", "torch", "transformers"])


def main() -> None:
    """Rows for two members, all members, and strangers, each with every batch."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--models", type=Path, nargs="+", help="folders of members with one tokenizer")
    words.add_argument("--draft", help="a member's folder name; without it members take turns")
    words.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    words.add_argument("--tokens", type=int, default=64)
    words.add_argument("--repeats", type=int, default=5)
    asked = words.parse_args()
    folders = asked.models or trained()
    models = {folder.name: graft.load(folder) for folder in folders}
    tokenizer = load_tokenizer(folders[0])
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pair = dict(list(models.items())[:2])
    chosen = [(f"speculation, {', '.join(pair)}", pair)]
    chosen += [(f"speculation, {', '.join(models)}", models)] if len(models) > 2 else []
    chosen += [("speculation, two members with random weights", strangers(pair))]
    for what, members in chosen:
        for batch in asked.batch:
            texts = (PROMPTS * (batch // len(PROMPTS) + 1))[:batch]
            prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            compare(what, ensemble_of(members), prompts, asked, asked.draft if asked.draft in members else None)


if __name__ == "__main__":
    main()
