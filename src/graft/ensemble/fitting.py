"""Fitting an ensemble's weights: from a data set and the members' folders to weights, each member run once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft import data, models
from graft.data.corpus import text_of
from graft.ensemble.classification import labels_of
from graft.ensemble.configuration import kind_of
from graft.ensemble.contributions import MOST, contributions
from graft.ensemble.diversity import error_correlation
from graft.ensemble.gate import Told, features, fit_gate
from graft.ensemble.linear import Settings, combine
from graft.ensemble.members import config_of
from graft.ensemble.reading import Read, classes, common_context, distributions, pair_items, text_items
from graft.ensemble.settings import EnsembleSettings, FittedWeights, GateSettings
from graft.ensemble.sources import Source
from graft.ensemble.weights import Fit, fit_linear, fit_log_linear
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
    """At most `documents` of each part of a data set's split."""
    name, split = data.split_ref(reference)
    corpus = data.open_corpus(sets, name, root)
    read = [list(itertools.islice(part.records(split), documents)) for part, _ in corpus.parts]
    parts = np.repeat(np.arange(len(read)), [len(records) for records in read])
    shares = np.array([share for _, share in corpus.parts])
    return HeldOut([record for records in read for record in records], corpus.format, parts, shares, device)


def fit_weights(settings: EnsembleSettings, weights: FittedWeights, job: Job, sources: list[Source]) -> Fit:
    """Each member is run once over the text; EM for a mixture, Newton's method for a product.

    A mixture of data sets counts by its shares: the loss is the mean over the parts' mean losses a token.
    """
    check_unseen({member: job.models[member] for member in settings.names}, [weights.fit], job.data, job.root)
    text = held_out(weights.fit, weights.documents, job.data, job.root, job.device)
    if settings.vocabulary == "bytes":
        from graft.ensemble.byte_level.fitting import fit as fit_over_bytes

        return fit_over_bytes(settings, sources, text.texts, text.importance, job.device)
    if weights.gate is not None:
        names = weights.gate.looks_at or settings.names
        seen = [place for place, source in enumerate(sources) if source.model in names]
        return _fit_gated(sources, text, weights.gate, seen, job.seed)
    fit = _fit_product if settings.rule == "log_linear" else _fit_mixture
    return fit(sources, text)


def _fit_mixture(sources: list[Source], text: HeldOut) -> Fit:
    told, at = columns(sources, text)
    importance = text.importance(at)
    fit = replace(fit_linear(told, importance), correlation=error_correlation(told))
    if len(sources) > MOST:
        return fit
    return replace(fit, contributions=contributions(told, float(np.log(_choices(sources[0]))), importance))


def _choices(source: Source) -> int:
    """Among how much a model without any knowledge would choose: the tokens, or of a classifier the classes."""
    config = config_of(source.folder)
    return len(labels_of(config)) if kind_of([config]) == "SequenceClassification" else int(config["vocab_size"])


def columns(sources: list[Source], text: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """Each member's log-probability of what comes `[members, tokens]`, and which record each token is from."""
    if _kind(sources) != "CausalLM":
        read = _read(sources, text)
        gold = read[0].gold[:, None]
        return np.stack([each.log_probs.gather(-1, gold)[:, 0].numpy() for each in read]), read[0].texts.numpy()
    scored = [_token_log_probs(source, text.texts, text.device) for source in sources]
    lengths = [len(column) for column in scored[0]]
    if any([len(c) for c in column] != lengths for column in scored):
        raise CannotCombine("the members cut the text into different tokens: their predictions cannot be matched")
    return np.stack([np.concatenate(column) for column in scored]), np.repeat(np.arange(len(lengths)), lengths)


def _kind(sources: list[Source]) -> str:
    # a product may have language models of the target beside a translator
    return kind_of([config_of(source.folder) for source in sources], "log_linear")


def _fit_product(sources: list[Source], text: HeldOut) -> Fit:
    read = _read(sources, text)
    importance = text.importance(read[0].texts.numpy())
    return fit_log_linear([each.log_probs for each in read], read[0].gold, importance)


def _fit_gated(sources: list[Source], text: HeldOut, settings: GateSettings, looks_at: list[int], seed: int) -> Fit:
    read = _read(sources, text, states=looks_at if settings.hidden_states else [])
    importance, gold = text.importance(read[0].texts.numpy()), read[0].gold
    looked = [Told(read[number].log_probs, read[number].states) for number in looks_at]
    inputs = features([each.log_probs for each in looked], [each.state for each in looked])
    told = torch.stack([each.log_probs.gather(-1, gold[:, None])[:, 0] for each in read])
    constant = fit_linear(told.numpy(), importance)
    share = torch.as_tensor(importance, dtype=torch.float32)
    start = torch.as_tensor(constant.weights, dtype=torch.float32)
    conduct = {"looks_at": looks_at, "states": settings.hidden_states, "skip": settings.skip}
    gate = fit_gate(told, inputs, start, share, hidden=settings.units, seed=seed, **conduct)
    with torch.no_grad():
        weights = gate.decide(looked)
        mixed = combine(list(told[..., None]), weights, Settings())[:, 0]
    share = share / share.sum()
    return replace(
        constant,
        weights=(share @ weights).double().numpy(),
        loss=-float(share @ mixed),
        constant=constant.loss,
        gate=gate.plain(),
        run=dict(enumerate((share @ (weights > 0).float()).tolist())),
    )


def _read(sources: list[Source], text: HeldOut, states: Sequence[int] = ()) -> list[Read]:
    """What each member says at the same tokens, or of the same texts' classes; those in `states` with hidden states.

    Raises CannotCombine where the data says nothing that such members could say.
    """
    kind, folders = _kind(sources), list(dict.fromkeys(source.folder for source in sources))
    if kind == "SequenceClassification":
        _check_format(text.format, ["labelled"], "classifiers")
        said, labels = ([record[field] for record in text.records] for field in ("text", "label"))
        return [classes(source, said, labels, text.device) for source in sources]
    if kind == "Seq2SeqLM":
        _check_format(text.format, ["pairs", "completion", "labelled"], "encoder-decoders")
        items = pair_items(folders, text.records, text.format)
    else:
        items = text_items(folders, text.texts)
    context, width = common_context(folders)
    return [
        distributions(source, items, context=context, width=width, device=text.device, states=number in states)
        for number, source in enumerate(sources)
    ]


def _check_format(found: str, wanted: list[str], what: str) -> None:
    if found not in wanted:
        raise CannotCombine(f"weights of {what} are fitted on {' or '.join(wanted)} data, found {found}")


def _importance(parts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """How much each token counts, given the part it is from: a part's tokens together count as its share."""
    return shares[parts] / np.bincount(parts, minlength=len(shares))[parts]


def _token_log_probs(source: Source, texts: list[str], device: str | None) -> list[np.ndarray]:
    scorer = Scorer(source.load(device), models.load_tokenizer(source.folder))
    return [scored.log_probs for scored in scorer.documents(texts)]
