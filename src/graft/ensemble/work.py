"""What making an ensemble does: weights (given or fitted), a configuration that names the members, a tokenizer."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graft import data, lineage
from graft.data.corpus import text_of
from graft.ensemble.settings import EnsembleSettings, FittedWeights
from graft.errors import CannotCombine
from graft.methods import method
from graft.settings import parse
from graft.verb import Facts, Job

if TYPE_CHECKING:
    from graft.ensemble.weights import Fit

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
        found += _fit_problems(settings)
    return found


def _constants(settings: EnsembleSettings) -> list[float]:
    """The weights, where they need no fitting: those given, else the rule's own."""
    if settings.given is not None:
        return settings.given
    rule = method("graft.ensemble", settings.rule)
    return rule.default(len(settings.names), parse(rule.Settings, settings.options))


def _fit_problems(settings: EnsembleSettings) -> list[str]:
    if settings.rule in ("linear", "log_linear"):
        return []
    return [f"weights can be fitted for linear and log_linear, found {settings.rule!r}: give its options"]


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
            "steps": fit.steps,
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
    fit = _fit_product if settings.rule == "log_linear" else _fit_mixture
    return fit(folders, texts, parts, shares, job.device)


def _fit_mixture(folders: list[Path], texts: list[str], parts: np.ndarray, shares: np.ndarray, device: Any) -> Fit:
    from graft.ensemble.weights import fit_linear

    columns = [_token_log_probs(folder, texts, device) for folder in folders]
    lengths = [len(column) for column in columns[0]]
    if any([len(c) for c in column] != lengths for column in columns):
        raise CannotCombine("the members cut the text into different tokens: their predictions cannot be matched")
    importance = _importance(np.repeat(parts, lengths), shares)
    return fit_linear(np.stack([np.concatenate(column) for column in columns]), importance)


def _fit_product(folders: list[Path], texts: list[str], parts: np.ndarray, shares: np.ndarray, device: Any) -> Fit:
    from graft.ensemble.reading import common_context, distributions, token_ids
    from graft.ensemble.weights import fit_log_linear

    ids = token_ids(folders, texts)
    context, width = common_context(folders)
    read = [distributions(folder, ids, context=context, width=width, device=device) for folder in folders]
    importance = _importance(parts[read[0].texts.numpy()], shares)
    return fit_log_linear([each.log_probs for each in read], read[0].gold, importance)


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
    from graft import models
    from graft.evaluate.scorer import Scorer

    scorer = Scorer(models.load(folder, device=device), models.load_tokenizer(folder))
    return [scored.log_probs for scored in scorer.documents(texts)]
