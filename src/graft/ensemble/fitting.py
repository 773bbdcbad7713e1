"""Fitting an ensemble's weights: from a data set and the members' folders to weights, each member run once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft import data, lineage, models
from graft.data.corpus import text_of
from graft.ensemble.contributions import MOST, contributions
from graft.ensemble.diversity import error_correlation
from graft.ensemble.gate import Told, features, fit_gate
from graft.ensemble.linear import Settings, combine
from graft.ensemble.reading import Read, common_context, distributions, token_ids
from graft.ensemble.settings import EnsembleSettings, FittedWeights, GateSettings
from graft.ensemble.weights import Fit, fit_linear, fit_log_linear
from graft.errors import CannotCombine
from graft.evaluate.scorer import Scorer
from graft.verb import Job


def fit_weights(settings: EnsembleSettings, weights: FittedWeights, job: Job) -> Fit:
    """Each member is run once over the text; EM for a mixture, Newton's method for a product.

    A mixture of data sets counts by its shares: the loss is the mean over the parts' mean losses a token.
    """
    name, split = data.split_ref(weights.fit)
    corpus = data.open_corpus(job.data, name, job.root)
    fingerprints = [corpus.fingerprint, *(part.fingerprint for part, _ in corpus.parts)]
    for member in settings.names:
        _check_unseen(member, job.models[member], fingerprints, split)
    read = [list(itertools.islice(part.records(split), weights.documents)) for part, _ in corpus.parts]
    texts = [text_of(record) for records in read for record in records]
    parts = np.repeat(np.arange(len(read)), [len(records) for records in read])
    shares = np.array([share for _, share in corpus.parts])
    folders = [job.models[member] for member in settings.names]
    if weights.gate is not None:
        seen = [settings.names.index(name) for name in weights.gate.looks_at or settings.names]
        return _fit_gated(folders, texts, parts, shares, job.device, weights.gate, sorted(seen), job.seed)
    fit = _fit_product if settings.rule == "log_linear" else _fit_mixture
    return fit(folders, texts, parts, shares, job.device)


def _fit_mixture(folders: list[Path], texts: list[str], parts: np.ndarray, shares: np.ndarray, device: Any) -> Fit:
    columns = [_token_log_probs(folder, texts, device) for folder in folders]
    lengths = [len(column) for column in columns[0]]
    if any([len(c) for c in column] != lengths for column in columns):
        raise CannotCombine("the members cut the text into different tokens: their predictions cannot be matched")
    importance = _importance(np.repeat(parts, lengths), shares)
    told = np.stack([np.concatenate(column) for column in columns])
    fit = replace(fit_linear(told, importance), correlation=error_correlation(told))
    if len(folders) > MOST:
        return fit
    nothing = float(np.log(models.load_config(folders[0]).vocab_size))
    return replace(fit, contributions=contributions(told, nothing, importance))


def _fit_product(folders: list[Path], texts: list[str], parts: np.ndarray, shares: np.ndarray, device: Any) -> Fit:
    read, importance = _kept(folders, texts, parts, shares, device)
    return fit_log_linear([each.log_probs for each in read], read[0].gold, importance)


def _fit_gated(
    folders: list[Path],
    texts: list[str],
    parts: np.ndarray,
    shares: np.ndarray,
    device: Any,
    settings: GateSettings,
    looks_at: list[int],
    seed: int,
) -> Fit:
    asked = looks_at if settings.hidden_states else []
    read, importance = _kept(folders, texts, parts, shares, device, states=asked)
    log_probs, gold = [each.log_probs for each in read], read[0].gold
    looked = [Told(read[number].log_probs, read[number].states) for number in looks_at]
    inputs = features([each.log_probs for each in looked], [each.state for each in looked])
    columns = torch.stack([each.gather(-1, gold[:, None])[:, 0] for each in log_probs])
    constant = fit_linear(columns.numpy(), importance)
    share = torch.as_tensor(importance, dtype=torch.float32)
    start = torch.as_tensor(constant.weights, dtype=torch.float32)
    conduct = {"looks_at": looks_at, "states": settings.hidden_states, "skip": settings.skip}
    gate = fit_gate(columns, inputs, start, share, hidden=settings.units, seed=seed, **conduct)
    with torch.no_grad():
        weights = gate.decide(looked)
        mixed = combine(list(columns[..., None]), weights, Settings())[:, 0]
    share = share / share.sum()
    return replace(
        constant,
        weights=(share @ weights).double().numpy(),
        loss=-float(share @ mixed),
        constant=constant.loss,
        gate=gate.plain(),
        run=dict(enumerate((share @ (weights > 0).float()).tolist())),
    )


def _kept(
    folders: list[Path],
    texts: list[str],
    parts: np.ndarray,
    shares: np.ndarray,
    device: Any,
    states: Sequence[int] = (),
) -> tuple[list[Read], np.ndarray]:
    """What each member says at the same tokens (those in `states` with their hidden ones), and how much each counts."""
    ids = token_ids(folders, texts)
    context, width = common_context(folders)
    read = [
        distributions(folder, ids, context=context, width=width, device=device, states=number in states)
        for number, folder in enumerate(folders)
    ]
    return read, _importance(parts[read[0].texts.numpy()], shares)


def _importance(parts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """How much each token counts, given the part it is from: a part's tokens together count as its share."""
    return shares[parts] / np.bincount(parts, minlength=len(shares))[parts]


def _check_unseen(member: str, folder: Path, fingerprints: list[str], split: str) -> None:
    """Raises CannotCombine where the member or a model it was made from was trained on this text."""
    trained = trained_on(folder)
    for fingerprint in fingerprints:
        if (fingerprint, split) in trained:
            raise CannotCombine(
                f"{member} was trained on {trained[fingerprint, split]}.{split}: weights fitted on it would favour the "
                f"member that knows it by heart; fit them on held-out text ({trained[fingerprint, split]}.dev)"
            )


def trained_on(folder: Path) -> dict[tuple[str, str], str]:
    """(fingerprint, split) of the data that went into a model's weights, its ancestors' included, with its name.

    From the manifests; a split named `dev` only chose among checkpoints. A model without a manifest gives nothing.
    """
    manifest = lineage.read_manifest(folder)
    if manifest is None:
        return {}
    found = {(use.fingerprint, use.split): use.name for use in manifest.data if use.split == "train"}
    for parent in manifest.parents:
        found |= trained_on(folder / parent.path)
    return found


def _token_log_probs(folder: Path, texts: list[str], device: str | None) -> list[np.ndarray]:
    scorer = Scorer(models.load(folder, device=device), models.load_tokenizer(folder))
    return [scored.log_probs for scored in scorer.documents(texts)]
