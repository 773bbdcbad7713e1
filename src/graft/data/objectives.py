"""Objectives: what turns packed rows into inputs and labels.

causal    every token is predicted from those before it (GPT).
prefix    a prefix is read in both directions, the rest is predicted from it (Raffel et al. 2020, section 3.2.1).
masked    tokens are hidden and predicted from both sides (BERT, Devlin et al. 2019, section 3.1).
span      runs of tokens are replaced by sentinels, which the decoder expands (T5, Raffel et al. 2020, section 3.1.4).

A batch holds `input_ids [batch, length]`, `labels` (-100: not trained on; for decoders labels[t] is the token at t,
which is predicted at t - 1), `segments` (tokens see each other only within one; -1 is padding), `positions`, and for
prefix LM `prefix` (bool: read in both directions). All of it follows from the seed and the row's number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from graft.data.corpus import AnyCorpus
from graft.data.packing import Mapped, MixedRows, pack
from graft.data.rows import Order, Row, Rows
from graft.data.stream import TokenStream, tokenize
from graft.errors import CannotCombine, DataError
from graft.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""Label of tokens that are not trained on."""


class Causal(Settings):
    """Every token is predicted from those before it."""

    kind: Literal["causal"] = "causal"


class Prefix(Settings):
    """A prefix (of a prompt with a completion: the prompt) is read in both directions, the rest predicted."""

    kind: Literal["prefix"] = "prefix"


class Masked(Settings):
    """Hidden tokens are predicted from both sides."""

    kind: Literal["masked"] = "masked"
    share: Annotated[float, Field(gt=0, lt=1, description="Share of the tokens that are predicted.")] = 0.15
    masked: Annotated[float, Field(ge=0, le=1, description="Share of these that become the mask token.")] = 0.8
    random: Annotated[float, Field(ge=0, le=1, description="Share of these that become a random token.")] = 0.1


class Span(Settings):
    """Runs of tokens are replaced by sentinels, which the decoder expands."""

    kind: Literal["span"] = "span"
    share: Annotated[float, Field(gt=0, lt=1, description="Share of the tokens that are taken out.")] = 0.15
    mean_length: Annotated[float, Field(ge=1, description="Mean length of a run in tokens.")] = 3.0


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


ObjectiveSettings = Annotated[Causal | Prefix | Masked | Span, Field(discriminator="kind"), BeforeValidator(_named)]
"""`causal`, or with its options `{kind: masked, share: 0.3}`."""

DEFAULT: dict[str, type[Settings]] = {"decoder": Causal, "encoder": Masked, "encoder-decoder": Span}
ALLOWED = {"decoder": ("causal", "prefix"), "encoder": ("masked",), "encoder-decoder": ("span",)}


def objective_for(architecture: str, settings: Settings | None) -> Settings:
    """The objective, or the default one of the architecture. Raises CannotCombine where they do not go together."""
    chosen = settings or DEFAULT[architecture]()
    if chosen.kind not in ALLOWED[architecture]:  # type: ignore[attr-defined]
        raise CannotCombine(
            f"objective {chosen.kind!r} does not go with architecture {architecture!r}, which trains by: "  # type: ignore[attr-defined]
            f"{', '.join(ALLOWED[architecture])}"
        )
    return chosen


def objective_rows(
    corpus: AnyCorpus,
    split: str,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    *,
    length: int,
    seed: int,
    cache: Path,
) -> Rows:
    """Rows of `length` tokens of one split, ready for a model: what pretraining and tuning train on."""
    streams = [(tokenize(part, split, tokenizer, cache), share) for part, share in corpus.parts]
    pad = pad_token(tokenizer)
    if isinstance(settings, Span):
        return _encoder_decoder_rows(streams, corpus.format, tokenizer, settings, length, seed, pad)
    rows = pack(streams, length, seed, whole=corpus.format != "text", pad=pad)
    if len(rows) == 0:
        raise DataError(
            f"{corpus.name}.{split}: nothing to train on within {length} tokens: every label is masked; raise `length`"
        )
    if isinstance(settings, Prefix):
        text = corpus.format == "text"
        return Mapped(rows, lambda row, i: prefix_row(row, _random(seed, i) if text else None), stacked)
    if isinstance(settings, Masked):
        special = special_tokens(tokenizer)
        if tokenizer.mask_token_id is None:
            raise DataError("masked LM needs a tokenizer with a mask token; this one has none")
        mask = int(tokenizer.mask_token_id)
        size = len(tokenizer)
        return Mapped(rows, lambda row, i: masked_row(row, settings, _random(seed, i), mask, size, special), stacked)
    return Mapped(rows, lambda row, i: causal_row(row), stacked)


def _random(seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, 3])


def pad_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """What fills rows up; never read, so any token will do."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Ids that are never masked or taken out."""
    return np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)


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
    row: Row, settings: Masked, random: np.random.Generator, mask: int, size: int, special: np.ndarray
) -> Row:
    """Hides `share` of the tokens: most behind the mask token, some behind a random one, the rest as they are."""
    ids = row["input_ids"].copy()
    eligible = np.flatnonzero((row["segments"] >= 0) & ~np.isin(ids, special))
    chosen = (
        random.permutation(eligible)[: max(1, round(settings.share * len(eligible)))] if len(eligible) else eligible
    )
    labels = np.full(len(ids), IGNORED, np.int64)
    labels[chosen] = ids[chosen]
    draw = random.random(len(chosen))
    ids[chosen[draw < settings.masked]] = mask
    swapped = chosen[(draw >= settings.masked) & (draw < settings.masked + settings.random)]
    ids[swapped] = random.choice(np.setdiff1d(np.arange(size), special), len(swapped))
    return {"input_ids": ids, "labels": labels, "segments": row["segments"], "positions": row["positions"]}


def span_row(ids: np.ndarray, settings: Span, random: np.random.Generator, sentinels: np.ndarray, end: int) -> Row:
    """`ids [n]` with runs replaced by sentinels, and the decoder's labels: each sentinel with its run, then `end`."""
    hidden = span_mask(len(ids), settings, random, len(sentinels))
    starts = hidden & ~np.concatenate([[False], hidden[:-1]])
    number = np.cumsum(starts) - 1
    inputs: list[int] = []
    labels: list[int] = []
    for place, token in enumerate(ids):
        if starts[place]:
            inputs.append(int(sentinels[number[place]]))
            labels.append(int(sentinels[number[place]]))
        (labels if hidden[place] else inputs).append(int(token))
    return {"input_ids": np.array(inputs), "labels": np.array([*labels, end])}


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


def _encoder_decoder_rows(
    streams: Sequence[tuple[TokenStream, float]],
    format: str,
    tokenizer: PreTrainedTokenizerFast,
    settings: Span,
    length: int,
    seed: int,
    pad: int,
) -> Rows:
    """One piece of a document a row: an encoder–decoder's attention has no room for several documents in one row."""
    end = int(tokenizer.eos_token_id if tokenizer.eos_token_id is not None else pad)
    collate = PaddedCollate(pad)
    parts: list[Rows] = []
    for place, (stream, _) in enumerate(streams):
        pieces = PieceRows(stream, length, seed + place, whole=format != "text")
        if format == "text":
            sentinels = sentinel_tokens(tokenizer)
            special = special_tokens(tokenizer)

            def corrupt(row: Row, i: int, sentinels: np.ndarray = sentinels, special: np.ndarray = special) -> Row:
                ids = row["input_ids"]
                return span_row(ids[~np.isin(ids, special)], settings, _random(seed, i), sentinels, end)

            parts.append(Mapped(pieces, corrupt, collate))
        else:
            parts.append(Mapped(pieces, lambda row, i: source_target_row(row), collate))
    if len(parts) == 1:
        return parts[0]
    mixed = MixedRows(parts, [share for _, share in streams], seed)
    return Mapped(mixed, lambda row, i: row, collate)


def sentinel_tokens(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Ids of `<extra_id_0>`, … in order. Raises DataError for a tokenizer without them."""
    from graft.data.tokenizers import SENTINELS

    vocabulary = tokenizer.get_vocab()
    found = [vocabulary[name] for name in SENTINELS if name in vocabulary]
    if not found:
        raise DataError("span corruption needs a tokenizer with sentinels (<extra_id_0>, …); this one has none")
    return np.array(found)


def source_target_row(row: Row) -> Row:
    """What is read goes into the encoder, what is to be produced (with its end) is what the decoder is trained on."""
    first = int(np.argmax(row["trained"]))
    return {"input_ids": row["input_ids"][:first], "labels": row["input_ids"][first:]}


class PieceRows:
    """Documents, or pieces of at most `length` tokens of them, one a row, shuffled anew in each epoch.

    `whole`: a document is one row, of which `length` tokens are kept; those of which nothing is trained on then go.
    """

    def __init__(self, stream: TokenStream, length: int, seed: int, *, whole: bool):
        self.stream, self.length = stream, length
        sizes = np.diff(np.asarray(stream.offsets))
        counts = np.ones_like(sizes) if whole else np.maximum(-(-sizes // length), 1)
        if whole:
            useful = [stream.document(d)[1][:length].any() for d in range(stream.documents)]
            counts = np.asarray(useful, np.int64)
        self.document = np.repeat(np.arange(len(sizes)), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        self.piece = np.arange(len(self.document)) - first
        if len(self.document) == 0:
            raise DataError(f"nothing to train on within {length} tokens: every label is masked; raise `length`")
        self.rows = Order(len(self.document), seed)

    def __len__(self) -> int:
        return self.rows.count

    def __getitem__(self, index: int) -> Row:
        place = self.rows(index)[1]
        ids, trained = self.stream.document(int(self.document[place]))
        here = slice(int(self.piece[place]) * self.length, (int(self.piece[place]) + 1) * self.length)
        return {"input_ids": ids[here].astype(np.int64), "trained": trained[here]}

    def collate(self, rows: Sequence[Row]) -> dict:
        raise NotImplementedError("pieces differ in length: an objective's collate pads them")


class PaddedCollate:
    """Rows of different lengths padded to the longest: `input_ids`, `attention_mask`, `labels`."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, rows: Sequence[Row]) -> dict:
        import torch

        def padded(name: str, fill: int) -> torch.Tensor:
            longest = max(len(row[name]) for row in rows)
            made = np.full((len(rows), longest), fill, np.int64)
            for place, row in enumerate(rows):
                made[place, : len(row[name])] = row[name]
            return torch.from_numpy(made)

        mask = torch.zeros(len(rows), max(len(row["input_ids"]) for row in rows), dtype=torch.int64)
        for place, row in enumerate(rows):
            mask[place, : len(row["input_ids"])] = 1
        return {"input_ids": padded("input_ids", self.pad), "attention_mask": mask, "labels": padded("labels", IGNORED)}


def stacked(rows: Sequence[Row]) -> dict:
    """Packed rows as one batch; no `segments` (so no mask) where every row is one unpadded document."""
    import torch

    names = list(rows[0])
    if all(int(row["segments"].min()) == int(row["segments"].max()) for row in rows) and "prefix" not in names:
        names = [name for name in names if name not in ("segments", "positions")]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in names}
