"""What turns packed rows into inputs and labels, by an objective.

A batch holds `input_ids [batch, length]`, `labels` (-100: not trained on; for decoders labels[t] is the token at t,
which is predicted at t - 1), `segments` (tokens see each other only within one; -1 is padding), `positions`, and for
prefix LM `prefix` (bool: read in both directions). Where a row holds one document only, `attention_mask` stands in the
place of segments and positions. All of it follows from the seed and the row's number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graft.data.alone import IGNORED, PaddedCollate, answers, pieces, some
from graft.data.bootstrap import bootstrap_stream
from graft.data.corpus import AnyCorpus, Corpus
from graft.data.objectives import Causal, Masked, Prefix, Span, lacking
from graft.data.packing import Mapped, pack
from graft.data.rows import Row, Rows
from graft.data.stream import TokenStream, tokenize
from graft.data.tokenizers import SENTINELS
from graft.errors import DataError
from graft.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Tokens:
    """The token ids that objectives need."""

    pad: int
    """Fills rows up; never read."""
    start: int | None
    end: int
    mask: int | None
    plain: np.ndarray
    """Ids that stand for text: these may be hidden, and stand in for others."""
    sentinels: np.ndarray
    """Ids of `<extra_id_0>`, … in order; empty for a tokenizer without them."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Tokens:
        """Those of a tokenizer. Raises DataError where it has no end token."""
        vocabulary = tokenizer.get_vocab()
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if end is None:
            raise DataError(f"{lacking(Causal(), (), None)}; this one has none")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        plain = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        sentinels = np.array([vocabulary[name] for name in SENTINELS if name in vocabulary], np.int64)
        return cls(int(pad), start, int(end), tokenizer.mask_token_id, plain, sentinels)

    @property
    def has(self) -> set[str]:
        """Which of `end`, `mask` and `sentinels` there are."""
        there = {"end": True, "mask": self.mask is not None, "sentinels": len(self.sentinels) > 0}
        return {name for name, found in there.items() if found}


def objective_rows(
    corpus: AnyCorpus,
    split: str,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    *,
    length: int,
    seed: int,
    cache: Path,
    together: bool = True,
    bootstrap: int | None = None,
) -> Rows:
    """Rows of `length` tokens of one split, ready for a model: what pretraining and tuning train on.

    Without `together` a row holds one document, for models that cannot keep several apart. `bootstrap` is the seed of a
    resample of the documents that stands in their place. Raises DataError where there is nothing to train on, or for a
    tokenizer without the tokens that the objective needs.
    """

    def stream(place: int, part: Corpus) -> TokenStream:
        if bootstrap is None:
            return tokenize(part, split, tokenizer, cache)
        return bootstrap_stream(part, split, tokenizer, cache, bootstrap, place)

    streams = [(stream(place, part), share) for place, (part, share) in enumerate(corpus.parts)]
    tokens, told = Tokens.of(tokenizer), (streams, f"{corpus.name}.{split}", corpus.format, length)
    if lost := lacking(settings, tokens.has, corpus.format):
        raise DataError(f"{lost}; this one has none")
    whole = corpus.format != "text"
    if isinstance(settings, Span) and whole:
        keep_end = corpus.format == "chat"
        found = answers(streams, length, seed, keep_end=keep_end, start=tokens.start, end=tokens.end)
        return Mapped(some(found, *told), lambda row, i: row, PaddedCollate(tokens.pad))
    together = together and not isinstance(settings, Span)
    rows = pack(streams, length, seed, whole=whole, pad=tokens.pad) if together else pieces(
        streams, length, seed, whole=whole
    )  # fmt: skip
    change = _change(settings, tokens, whole, seed)
    return Mapped(some(rows, *told), change, stacked if together else PaddedCollate(tokens.pad))


def _change(settings: Settings, tokens: Tokens, whole: bool, seed: int) -> Callable[[Row, int], Row]:
    """What the objective does to row `i`; `whole`: the data says what is to be produced."""
    if isinstance(settings, Prefix):
        return lambda row, i: prefix_row(row, None if whole else _random(seed, i))
    if isinstance(settings, Masked):
        return lambda row, i: masked_row(row, settings, _random(seed, i), tokens, answers_only=whole)
    if isinstance(settings, Span):
        return lambda row, i: span_row(row["input_ids"], settings, _random(seed, i), tokens)
    return lambda row, i: causal_row(row)


def _random(seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, 3])


def causal_row(row: Row) -> Row:
    """labels = the token itself where it is trained on."""
    labels = np.where(row["trained"], row["input_ids"], IGNORED)
    return {"input_ids": row["input_ids"], "labels": labels, "segments": row["segments"], "positions": row["positions"]}


def prefix_row(row: Row, random: np.random.Generator | None) -> Row:
    """A prefix of each segment is read in both directions and not trained on.

    With `random` its length is drawn between 1 and the segment's length less 1; without, it is all that stands before
    the first trained token (the prompt).
    """
    plain = causal_row(row)
    prefix = np.zeros(len(row["segments"]), bool)
    for segment in range(int(row["segments"].max()) + 1):
        places = np.flatnonzero(row["segments"] == segment)
        trained = np.flatnonzero(row["trained"][places])
        if random is not None:
            size = int(random.integers(1, max(len(places), 2)))
        else:
            size = int(trained[0]) if len(trained) else len(places)
        prefix[places[:size]] = True
    plain["labels"] = np.where(prefix, IGNORED, plain["labels"])
    return {**plain, "prefix": prefix}


def masked_row(
    row: Row, settings: Masked, random: np.random.Generator, tokens: Tokens, *, answers_only: bool = False
) -> Row:
    """Hides `share` of the tokens: most behind the mask token, some behind a random one, the rest as they are.

    `answers_only` hides only tokens that are to be produced.
    """
    ids = row["input_ids"].copy()
    allowed = (row["trained"] if answers_only else row["segments"] >= 0) & np.isin(ids, tokens.plain)
    eligible = np.flatnonzero(allowed)
    count = min(len(eligible), max(1, round(settings.share * len(eligible))))
    chosen = random.permutation(eligible)[:count]
    labels = np.full(len(ids), IGNORED, np.int64)
    labels[chosen] = ids[chosen]
    draw = random.random(count)
    ids[chosen[draw < settings.masked]] = tokens.mask
    swapped = chosen[(draw >= settings.masked) & (draw < settings.masked + settings.random)]
    ids[swapped] = random.choice(tokens.plain, len(swapped))
    return {"input_ids": ids, "labels": labels, "segments": row["segments"], "positions": row["positions"]}


def span_row(ids: np.ndarray, settings: Span, random: np.random.Generator, tokens: Tokens) -> Row:
    """`ids [n]` with runs replaced by sentinels, and the labels: each sentinel with its run. Both finish with the end.

    The start and end tokens of documents are left out.
    """
    ids = ids[np.isin(ids, tokens.plain)]
    hidden = span_mask(len(ids), settings, random, len(tokens.sentinels))
    starts = hidden & ~np.concatenate([[False], hidden])[:-1]
    number = np.cumsum(starts) - 1
    inputs: list[int] = []
    labels: list[int] = []
    for place, token in enumerate(ids):
        if starts[place]:
            sentinel = int(tokens.sentinels[number[place]])
            inputs.append(sentinel)
            labels.append(sentinel)
        (labels if hidden[place] else inputs).append(int(token))
    return {"input_ids": np.array([*inputs, tokens.end]), "labels": np.array([*labels, tokens.end])}


def span_mask(length: int, settings: Span, random: np.random.Generator, most: int) -> np.ndarray:
    """[length] bool: which tokens are taken out. Runs and gaps are drawn as T5 does: a random cut of their totals."""
    if length < 2:
        return np.ones(length, bool)
    hidden = min(max(round(length * settings.share), 1), length - 1)
    runs = min(max(round(hidden / settings.mean_length), 1), hidden, length - hidden, most)
    gaps, sizes = _cut(length - hidden, runs, random), _cut(hidden, runs, random)
    return np.repeat(np.tile([False, True], runs), np.stack([gaps, sizes], 1).ravel())


def _cut(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """`parts` whole numbers ≥ 1 that sum to `total`, every way of cutting equally likely."""
    cuts = np.sort(random.choice(np.arange(1, total), parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))


def stacked(rows: Sequence[Row]) -> dict:
    """Packed rows as one batch; no `segments` (so no mask) where every row is one unpadded document."""
    import torch

    names = list(rows[0])
    if all(int(row["segments"].min()) == int(row["segments"].max()) for row in rows) and "prefix" not in names:
        names = [name for name in names if name not in ("segments", "positions")]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in names}
