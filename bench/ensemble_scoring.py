"""Scoring documents with an ensemble of 2 and 4 members beside the sum of the members' own scoring: seconds, fp32.

The ensemble cuts the text once and batches it once for all members; each member alone cuts and batches it again. What
both give is compared first: the ensemble's log-probabilities are those of the mixture of the members'.

OMP_NUM_THREADS=4 python bench/ensemble_scoring.py [--models FOLDER ...] [--members 2 4] [--documents 100] [--repeats 5]

Without models the members have random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from _side_by_side import Side, measure, report, timed
from ensemble_decoding import VOCABULARY, members
from graft import data
from graft.data.corpus import text_of
from graft.data.tokenizers import train_tokenizer
from graft.ensemble.model import ensemble_of
from graft.evaluate.scorer import Scorer
from graft.models import load_tokenizer

SOURCE = {"source": "python-library", "keep": "docstrings", "limit": 4000}
LENGTH = 2000
"""Characters of a document."""


def prepared(documents: int, folders: Sequence[Path] = ()) -> tuple[list[str], Any]:
    """Texts, and the tokenizer of these folders, or where there are none one that was trained on such texts."""
    corpus = data.open_corpus({"text": data.parse(SOURCE)}, "text", Path())
    whole = "\n".join(text_of(record) for record in corpus.records("train"))
    texts = [whole[place * LENGTH : (place + 1) * LENGTH] for place in range(documents)]
    tokenizer = load_tokenizer(folders[0]) if folders else train_tokenizer(corpus, "bpe", VOCABULARY)
    return [text for text in texts if text], tokenizer


def log_probs(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Of every token of all texts."""
    return np.concatenate([each.log_probs for each in Scorer(model, tokenizer).documents(texts)])


def main() -> None:
    """One row for each number of members."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--models", type=Path, nargs="+", default=[], help="folders of members with one tokenizer")
    words.add_argument("--members", type=int, nargs="+", default=[2, 4])
    words.add_argument("--documents", type=int, default=100)
    words.add_argument("--repeats", type=int, default=5)
    asked = words.parse_args()
    texts, tokenizer = prepared(asked.documents, asked.models)
    for count in asked.members:
        models = members(asked.models, count)
        ensemble = ensemble_of({str(place): model for place, model in enumerate(models)})
        alone = [log_probs(model, tokenizer, texts) for model in models]
        together = log_probs(ensemble, tokenizer, texts)
        if not np.allclose(together, np.logaddexp.reduce(alone) - np.log(count), atol=1e-4):
            raise SystemExit("the ensemble does not give the mixture of its members")
        sides = [
            Side("ensemble", timed(lambda: log_probs(ensemble, tokenizer, texts))),  # noqa: B023
            Side("sum of members", timed(lambda: [log_probs(model, tokenizer, texts) for model in models])),  # noqa: B023
        ]
        what = f"scoring, {count} members, {len(texts)} documents of {len(together):,} tokens"
        report(what, measure(sides, asked.repeats), unit="s", packages=["graft", "torch", "transformers"])


if __name__ == "__main__":
    main()
