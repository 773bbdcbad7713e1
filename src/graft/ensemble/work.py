"""What making an ensemble does: weights (given or fitted), a configuration that names the members, a tokenizer."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graft import data, lineage
from graft.ensemble.settings import EnsembleSettings, FittedWeights
from graft.ensemble.weights import Fit, fit_linear
from graft.errors import CannotCombine
from graft.methods import method
from graft.settings import parse
from graft.verb import Facts, Job

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def problems(settings: EnsembleSettings, models: Mapping[str, Facts]) -> list[str]:
    """What is wrong with an ensemble of these members, a sentence each."""
    found = []
    first = settings.names[0]
    for name in settings.names[1:]:
        if models[name].vocabulary != models[first].vocabulary:
            found.append(
                f"{name} and {first} have different vocabularies: their predictions cannot be matched token by token"
            )
        if models[name].architecture != models[first].architecture:
            found.append(f"{name} is a {models[name].architecture} and {first} a {models[first].architecture}")
    if models[first].architecture != "decoder":
        found.append(
            f"an ensemble needs decoders, which predict token by token; {first} is an {models[first].architecture}"
        )
    if not isinstance(settings.weights, FittedWeights):
        wrong = method("graft.ensemble", settings.rule).problem(_constants(settings))
        found += [wrong] if wrong else []
    if isinstance(settings.weights, FittedWeights):
        found += _fit_problems(settings, settings.weights)
    return found


def _constants(settings: EnsembleSettings) -> list[float]:
    """The weights, where they need no fitting: those given, else the rule's own."""
    if settings.given is not None:
        return settings.given
    rule = method("graft.ensemble", settings.rule)
    return rule.default(len(settings.names), parse(rule.Settings, settings.options))


def _fit_problems(settings: EnsembleSettings, weights: FittedWeights) -> list[str]:
    found = []
    if settings.rule != "linear":
        found.append(f"weights can be fitted for `combine: linear`, found {settings.rule!r}: give its weights")
    return found


def run(job: Job) -> dict[str, Any]:
    """Write the ensemble's folder into `job.out`; returns the weights and how they were found."""
    settings = job.settings
    assert isinstance(settings, EnsembleSettings)
    found: dict[str, Any] = {}
    if not isinstance(settings.weights, FittedWeights):
        weights = _constants(settings)
    else:
        fit = fit_weights(settings, settings.weights, job)
        weights = [float(w) for w in fit.weights]
        found = {
            "loss": fit.loss,
            "member_losses": dict(zip(settings.names, map(float, fit.members), strict=True)),
            "em_steps": fit.steps,
            "gap": fit.gap,
        }
    _write(job, settings, weights)
    return {"weights": dict(zip(settings.names, weights, strict=True)), **found}


def _write(job: Job, settings: EnsembleSettings, weights: list[float]) -> None:
    from graft.checkpoint import atomic_write
    from graft.ensemble.model import EnsembleConfig, member_entry

    seen_from = job.target or job.out
    entries = []
    for name in settings.names:
        if settings.self_contained:
            shutil.copytree(job.models[name], job.out / "members" / name, dirs_exist_ok=True)
            entries.append(member_entry(name, job.out / "members" / name, job.out))
        else:
            entries.append(member_entry(name, job.models[name], seen_from))
    first = Path(job.models[settings.names[0]])
    for file in TOKENIZER_FILES:
        if (first / file).exists():
            shutil.copyfile(first / file, job.out / file)
    config = EnsembleConfig(entries, settings.rule, weights, settings.options)
    atomic_write(job.out / "config.json", json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def fit_weights(settings: EnsembleSettings, weights: FittedWeights, job: Job) -> Fit:
    """Each member is run once over the text; then EM. Tokens of a mixture's parts count by the parts' shares."""
    name, split = data.split_ref(weights.fit)
    corpus = data.open_corpus(job.data, name, job.root)
    for member in settings.names:
        _check_unseen(
            member, job.models[member], [corpus.fingerprint, *(p.fingerprint for p, _ in corpus.parts)], split
        )
    texts, importance = [], []
    for part, share in corpus.parts:
        documents = list(itertools.islice(part.records(split), weights.documents))
        texts += documents
        importance += [share / len(documents)] * len(documents)
    columns = [_token_log_probs(job.models[member], texts, job.device) for member in settings.names]
    lengths = [len(column) for column in columns[0]]
    if any([len(c) for c in column] != lengths for column in columns):
        raise CannotCombine("the members cut the text into different tokens: their predictions cannot be matched")
    mean = np.repeat(np.asarray(importance) / np.maximum(lengths, 1) * np.mean(lengths), lengths)
    return fit_linear(np.stack([np.concatenate(column) for column in columns]), mean)


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


def _token_log_probs(folder: Path, records: list[dict[str, Any]], device: str | None) -> list[np.ndarray]:
    from graft import models
    from graft.data.corpus import text_of
    from graft.evaluate.scorer import Scorer

    scorer = Scorer(models.load(folder, device=device), models.load_tokenizer(folder))
    return [scored.log_probs for scored in scorer.documents([text_of(record) for record in records])]
