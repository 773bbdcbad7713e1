"""Fitting an ensemble's weights: from a data set and the members' folders to weights, each member run once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft import data, models
from graft.data.corpus import drawn, text_of
from graft.ensemble.classification import labels_of
from graft.ensemble.configuration import kind_of, of_text, width_of
from graft.ensemble.contributions import contributions, contributions_to_product
from graft.ensemble.diversity import error_correlation
from graft.ensemble.kept import Kept, columns_of, kept_of, read, stride_of
from graft.ensemble.members import config_of
from graft.ensemble.reading import Item, Read, classes, common_context, distributions, pair_items, text_items
from graft.ensemble.settings import EnsembleSettings, FittedWeights, GateSettings
from graft.ensemble.sources import Source
from graft.ensemble.union_said import union_said
from graft.ensemble.weights import Fit, fit_gated, fit_linear, fit_log_linear
from graft.errors import CannotCombine
from graft.evaluate.scorer import Scorer
from graft.evaluate.unseen import check_unseen
from graft.verb import Job


@dataclass(frozen=True)
class HeldOut:
    """What weights are fitted on: `records` of one `format`, the part of the data set that each is from (`parts
    [records]`), and how much each part counts (`shares [parts]`)."""

    records: list[dict[str, Any]]
    format: str
    parts: np.ndarray
    shares: np.ndarray
    device: str | None

    @property
    def texts(self) -> list[str]:
        """The records as text."""
        return [text_of(record) for record in self.records]

    def importance(self, at: np.ndarray) -> np.ndarray:
        """How much each token counts, given the record it is from: a part's tokens together count as its share."""
        return _importance(self.parts[at], self.shares)


def held_out(reference: str, documents: int, sets: Mapping[str, Any], root: Path, device: str | None) -> HeldOut:
    """At most `documents` of each part of a data set's split, drawn from all of it by their hashes."""
    name, split = data.split_ref(reference)
    corpus = data.open_corpus(sets, name, root)
    read = [drawn(part.records(split), documents) for part, _ in corpus.parts]
    parts = np.repeat(np.arange(len(read)), [len(records) for records in read])
    shares = np.array([share for _, share in corpus.parts])
    return HeldOut([record for records in read for record in records], corpus.format, parts, shares, device)


def fit_weights(settings: EnsembleSettings, weights: FittedWeights, job: Job, sources: list[Source]) -> Fit:
    """Each member is run once over the text; EM for a mixture, Newton's method for a product.

    A mixture of data sets counts by its shares: the loss is the mean over the parts' mean losses a token.
    """
    check_unseen({member: job.models[member] for member in settings.names}, [weights.fit], job.data, job.root)
    text = held_out(weights.fit, weights.documents, job.data, job.root, job.device)
    names = (weights.gate.looks_at if weights.gate is not None else None) or settings.names
    seen = [place for place, source in enumerate(sources) if source.model in names]
    if settings.vocabulary == "bytes":
        from graft.ensemble.byte_level.fitting import fit as fit_over_bytes

        return fit_over_bytes(settings, sources, text.texts, text.importance, job.device, seen, job.seed)
    if weights.gate is not None:
        return _fit_gated(sources, text, weights.gate, seen, job.seed)
    if settings.rule == "log_linear":
        return _fit_product(sources, text, weights.top_k)
    return _fit_mixture(sources, text, settings.vocabulary == "union")


def _fit_mixture(sources: list[Source], text: HeldOut, union: bool) -> Fit:
    if union:
        said = union_said(sources, text.texts, text.device)
        return replace(_mixture(sources, text, said.log_probs, said.texts, said.tokens), unmatched=said.unmatched)
    return _mixture(sources, text, *columns(sources, text), _choices(sources[0]))


def _mixture(sources: list[Source], text: HeldOut, told: np.ndarray, at: np.ndarray, choices: int) -> Fit:
    """The best constant weights for `told [members, tokens]`, of the records `at [tokens]`; who contributes what."""
    importance = text.importance(at)
    missed = contributions(told, float(np.log(choices)), importance, texts=at)
    return replace(fit_linear(told, importance), correlation=error_correlation(told), contributions=missed)


def _choices(source: Source) -> int:
    """Among how much a model without any knowledge would choose: the tokens, or of a classifier the classes."""
    config = config_of(source.folder)
    return (
        len(labels_of(config)) if kind_of([config]) == "SequenceClassification" else int(of_text(config)["vocab_size"])
    )


def columns(sources: list[Source], text: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """Each member's log-probability of what comes `[members, tokens]`, and which record each token is from."""
    if _kind(sources) != "CausalLM":
        kept = _kept(sources, text)
        return np.stack([each.log_probs.numpy() for each in kept]), kept[0].texts.numpy()
    scored = [_token_log_probs(source, text.texts, text.device) for source in sources]
    lengths = [len(column) for column in scored[0]]
    if any([len(c) for c in column] != lengths for column in scored):
        raise CannotCombine("the members cut the text into different tokens: their predictions cannot be matched")
    return np.stack([np.concatenate(column) for column in scored]), np.repeat(np.arange(len(lengths)), lengths)


def _kind(sources: list[Source]) -> str:
    # a product may have language models of the target beside a translator
    return kind_of([config_of(source.folder) for source in sources], "log_linear")


LIKELIEST = 64
"""Tokens of each member, with all others as a tail, that are looked at to say what a product's members contribute."""


def _fit_product(sources: list[Source], text: HeldOut, top_k: int | None) -> Fit:
    if top_k is None:
        read = _read(sources, text)
        width, importance = read[0].log_probs.shape[-1], text.importance(read[0].texts.numpy())
        kept = [kept_of(each.log_probs, each.gold, each.texts, top_k=LIKELIEST) for each in read]
        found = columns_of(kept, width)
        fit = fit_log_linear([each.log_probs for each in read], read[0].gold, importance)
    else:
        kept, width = _kept(sources, text, top_k=top_k), common_context(_folders(sources))[1]
        found, importance = columns_of(kept, width), text.importance(kept[0].texts.numpy())
        fit = fit_log_linear(found.log_probs, found.place, importance, log_counts=found.log_counts)
    told = np.stack([each.log_probs.numpy() for each in kept])
    missed = contributions_to_product(found, float(np.log(width)), importance, kept[0].texts.numpy())
    return replace(fit, correlation=error_correlation(told), contributions=missed)


def _fit_gated(sources: list[Source], text: HeldOut, settings: GateSettings, looks_at: list[int], seed: int) -> Fit:
    kept = _kept(sources, text, looks_at if settings.hidden_states else [])
    importance = text.importance(kept[0].texts.numpy())
    looked = [kept[number] for number in looks_at]
    inputs = torch.cat(
        [*(each.seen for each in looked), *(each.state for each in looked if each.state is not None)], -1
    )
    told = torch.stack([each.log_probs for each in kept])
    constant = _mixture(sources, text, told.numpy(), kept[0].texts.numpy(), _choices(sources[0]))
    return fit_gated(constant, told, inputs, importance, settings, looks_at, seed)


def _read(sources: list[Source], text: HeldOut) -> list[Read]:
    """Whole distributions of each member at the same tokens, or of the same texts' classes.

    Raises CannotCombine where the data says nothing that such members could say.
    """
    if _kind(sources) == "SequenceClassification":
        return _classes(sources, text)
    items, (context, width) = _items(sources, text), common_context(_folders(sources))
    return [distributions(source, items, context=context, width=width, device=text.device) for source in sources]


def _kept(sources: list[Source], text: HeldOut, states: Sequence[int] = (), *, top_k: int | None = None) -> list[Kept]:
    """What is kept of that: of members in `states` with hidden states, with `top_k` so many likeliest tokens."""
    if _kind(sources) == "SequenceClassification":
        return [kept_of(each.log_probs, each.gold, each.texts) for each in _classes(sources, text)]
    items, (context, width) = _items(sources, text), common_context(_folders(sources))
    channels = max((width_of(config_of(sources[number].folder)) for number in states), default=0)
    stride = stride_of(items, context, 3 + channels + 2 * (top_k or 0))
    given: dict[str, Any] = {"context": context, "width": width, "stride": stride, "device": text.device}
    return [read(each, items, states=number in states, top_k=top_k, **given) for number, each in enumerate(sources)]


def _folders(sources: list[Source]) -> list[Path]:
    return list(dict.fromkeys(source.folder for source in sources))


def _classes(sources: list[Source], text: HeldOut) -> list[Read]:
    """What classifiers say of the texts."""
    _check_format(text.format, ["labelled"], "classifiers")
    said, labels = ([record[field] for record in text.records] for field in ("text", "label"))
    return [classes(source, said, labels, text.device) for source in sources]


def _items(sources: list[Source], text: HeldOut) -> list[Item]:
    """What the members are asked."""
    if _kind(sources) == "Seq2SeqLM":
        _check_format(text.format, ["pairs", "completion", "labelled"], "encoder-decoders")
        return pair_items(_folders(sources), text.records, text.format)
    return text_items(_folders(sources), text.texts)


def _check_format(found: str, wanted: list[str], what: str) -> None:
    if found not in wanted:
        raise CannotCombine(f"weights of {what} are fitted on {' or '.join(wanted)} data, found {found}")


def _importance(parts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """How much each token counts, given the part it is from: a part's tokens together count as its share."""
    return shares[parts] / np.bincount(parts, minlength=len(shares))[parts]


def _token_log_probs(source: Source, texts: list[str], device: str | None) -> list[np.ndarray]:
    scorer = Scorer(source.load(device), models.load_tokenizer(source.folder))
    return [scored.log_probs for scored in scorer.documents(texts)]
