"""Objectives: what turns packed rows into inputs and labels.

causal    every token is predicted from those before it (GPT).
prefix    a prefix is read in both directions, the rest is predicted from it (Raffel et al. 2020, section 3.2.1).
masked    tokens are hidden and predicted from both sides (BERT, Devlin et al. 2019, section 3.1).
span      runs of tokens are replaced by sentinels, which the decoder expands (T5, Raffel et al. 2020, section 3.1.4).

A batch holds `input_ids [batch, length]`, `labels` (-100: not trained on; for decoders labels[t] is the token at t,
which is predicted at t - 1), `segments` (tokens see each other only within one; -1 is padding), `positions`, and for
prefix LM `prefix` (bool: read in both directions). Where a row holds one document only, `attention_mask` stands in the
place of segments and positions. All of it follows from the seed and the row's number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from graft.data.alone import IGNORED, PaddedCollate, answers, pieces, some
from graft.data.bootstrap import bootstrap_stream
from graft.data.corpus import AnyCorpus, Corpus
from graft.data.packing import Mapped, pack
from graft.data.rows import Row, Rows
from graft.data.stream import TokenStream, tokenize
from graft.data.tokenizers import SENTINELS
from graft.errors import CannotCombine, DataError
from graft.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Causal(Settings):
    """Every token is predicted from those before it."""

    kind: Literal["causal"] = "causal"


class Prefix(Settings):
    """A prefix (of a prompt with a completion: the prompt) is read in both directions, the rest predicted.

    The configuration of what is trained so says `prefix_lm: true`: graft then scores and writes behind prompts that are
    read in both directions too.
    """

    kind: Literal["prefix"] = "prefix"


class Masked(Settings):
    """Hidden tokens are predicted from both sides."""

    kind: Literal["masked"] = "masked"
    share: Annotated[float, Field(gt=0, lt=1, description="Share of the tokens that are predicted.")] = 0.15
    masked: Annotated[float, Field(ge=0, le=1, description="Share of these that become the mask token.")] = 0.8
    random: Annotated[float, Field(ge=0, le=1, description="Share of these that become a random token.")] = 0.1

    @model_validator(mode="after")
    def _at_most_all(self) -> Masked:
        if self.masked + self.random > 1:
            raise ValueError(f"expected masked + random of at most 1, found {self.masked} + {self.random}")
        return self


class Span(Settings):
    """Runs of tokens are replaced by sentinels, which the decoder expands.

    Data that says what is to be produced (a completion, a label, a target) goes in whole instead: what is read into the
    encoder, what is to be produced into the decoder.
    """

    kind: Literal["span"] = "span"
    share: Annotated[float, Field(gt=0, lt=1, description="Share of the tokens that are taken out.")] = 0.15
    mean_length: Annotated[float, Field(ge=1, description="Mean length of a run in tokens.")] = 3.0


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


ObjectiveSettings = Annotated[Causal | Prefix | Masked | Span, Field(discriminator="kind"), BeforeValidator(_named)]
"""`causal`, or with its options `{kind: masked, share: 0.3}`."""

DEFAULT: dict[str, type[Settings]] = {"decoder": Causal, "encoder": Masked, "encoder-decoder": Span}
ALLOWED = {"decoder": ("causal", "prefix"), "encoder": ("masked",), "encoder-decoder": ("span",)}


PREFIX_LM = "prefix_lm"
"""What the configuration of a decoder says that was last trained by the objective `prefix`."""


def is_prefix_lm(config: Any) -> bool:
    """Whether a configuration (or a mapping of what it says) is that of a prefix LM."""
    return bool(config.get(PREFIX_LM) if isinstance(config, Mapping) else getattr(config, PREFIX_LM, False))


def told_of(config: Mapping[str, Any], objective: Settings) -> dict[str, Any]:
    """A configuration after a training by `objective`: whether it is a prefix LM's."""
    plain = {key: value for key, value in config.items() if key != PREFIX_LM}
    return plain | {PREFIX_LM: True} if isinstance(objective, Prefix) else plain


def objective_for(architecture: str, settings: Settings | None, config: Any = None) -> Settings:
    """The objective; without one that of the model with this `config` (a prefix LM stays one), or the architecture's.

    Raises CannotCombine where objective and architecture do not go together.
    """
    usual = Prefix if architecture == "decoder" and is_prefix_lm(config) else DEFAULT[architecture]
    chosen = settings or usual()
    if chosen.kind not in ALLOWED[architecture]:  # type: ignore[attr-defined]
        raise CannotCombine(
            f"objective {chosen.kind!r} does not go with architecture {architecture!r}, which trains by: "  # type: ignore[attr-defined]
            f"{', '.join(ALLOWED[architecture])}"
        )
    return chosen


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


def lacking(settings: Settings, has: Collection[str], format: str | None) -> str | None:
    """What a tokenizer that has these (of `end`, `mask`, `sentinels`) lacks to train by an objective; None: nothing.

    Of data whose `format` is not known (None) nothing is said that depends on it.
    """
    if "end" not in has:
        return "training needs a tokenizer with an end token"
    if isinstance(settings, Masked) and "mask" not in has:
        return "masked LM needs a tokenizer with a mask token"
    if isinstance(settings, Span) and format == "text" and "sentinels" not in has:
        return "span corruption needs a tokenizer with sentinels (<extra_id_0>, …)"
    return None


def unspeakable(objective: Settings, name: str, has: Collection[str] | None, format: str | None) -> list[str]:
    """Why the tokenizer of the model (or in the folder) `name` does not do for an objective; a sentence, or nothing."""
    if has is None:
        return []
    if "text" not in has:
        return [f"{name} has no tokenizer: put its tokenizer.json into the folder, or name a model that has one"]
    if lost := lacking(objective, has, format):
        return [f"{lost}; that of {name} has none: take a new one (`tokenizer: {{size: …}}`), or another model's"]
    return []


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
