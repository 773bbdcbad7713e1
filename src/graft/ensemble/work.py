"""What making an ensemble does: weights (given or fitted), a configuration that names the members, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from graft.data import open_corpus, split_ref
from graft.data.corpus import text_of
from graft.ensemble.byte_level.work import configuration as byte_configuration
from graft.ensemble.checks import constants
from graft.ensemble.settings import HAVE_PARTS, EnsembleSettings, FittedWeights
from graft.ensemble.sources import Source, sources_of
from graft.finite import check_folder
from graft.folders import companions, copy_companions
from graft.methods import method
from graft.progress import say
from graft.settings import parse
from graft.verb import Job


def run(job: Job) -> dict[str, Any]:
    """Write the ensemble's folder into `job.out`; returns the weights and, where fitted, the losses (nats a token).

    Raises CheckpointError for members whose weights are NaN or Inf.
    """
    settings = job.settings
    assert isinstance(settings, EnsembleSettings)
    sources = sources_of(settings, job.models, job.seed)
    for folder in dict.fromkeys(source.folder for source in sources):
        check_folder(folder)
    names = [source.name for source in sources]
    if not isinstance(settings.weights, FittedWeights):
        weights = [constants(settings)[source.entry] * source.share for source in sources]
        _write(job, settings, sources, weights)
        lost = _show(job, settings, sources, weights, None)
        return {"weights": dict(zip(names, weights, strict=True)), **_by_name("unmatched_mass", names, lost)}
    from graft.ensemble.fitting import fit_weights

    fit = fit_weights(settings, settings.weights, job, sources)
    weights = [float(weight) for weight in fit.weights]
    if fit.gate is None and max(weights) <= 0:
        say(f"{job.name}: no weight is above zero: on this text the product turns away from what its members expect")
    _write(job, settings, sources, weights, fit.gate)
    _show(job, settings, sources, weights, fit.gate)
    return {
        "weights": dict(zip(names, weights, strict=True)),
        "loss": fit.loss,
        "member_losses": dict(zip(names, map(float, fit.members), strict=True)),
        "steps": fit.steps,
        "gap": fit.gap,
        "contributions": {name: asdict(each) for name, each in zip(names, fit.contributions, strict=False)},
        **_by_name("unmatched_mass", names, fit.unmatched),
        **({} if settings.weights.top_k is None else {"top_k": settings.weights.top_k}),
        **({} if fit.correlation is None else {"error_correlation": _table(names, fit.correlation)}),
        **({} if fit.gate is None else {"loss_without_gate": fit.constant}),
        **({} if fit.gate is None else {"needed": {names[at]: share for at, share in fit.run.items()}}),
    }


def _by_name(what: str, names: Sequence[str], values: Sequence[float]) -> dict[str, dict[str, float]]:
    """A number of each member under one name; nothing where there are none."""
    return {what: dict(zip(names, values, strict=True))} if values else {}


SHOWN = 2000
"""Characters of a document that are shown at most."""


def _show(
    job: Job, settings: EnsembleSettings, sources: list[Source], weights: list[float], gate: Any
) -> Sequence[float]:
    """Write who speaks in the first document of what is to be shown, for the report; what mass a union does not mix."""
    fitted = settings.weights.fit if isinstance(settings.weights, FittedWeights) else None
    reference = settings.show or fitted
    if reference is None or not _can_be_shown(settings, sources):
        return ()
    from graft.disk import atomic_write
    from graft.ensemble.byte_level import show as byte_show
    from graft.ensemble.byte_level.fitting import cover_of
    from graft.ensemble.show import spoken_by, spoken_in_union
    from graft.ensemble.spoken import FILE

    name, split = split_ref(reference)
    texts = map(text_of, open_corpus(job.data, name, job.root).records(split))
    text = next((text[:SHOWN] for text in texts if text.strip()), None)
    if text is None:
        return ()
    rule = method("graft.ensemble", settings.rule)
    options = parse(rule.Settings, settings.options)
    product = None if settings.rule == "linear" else partial(rule.combine, options=options)
    if settings.vocabulary == "bytes":
        spoken = byte_show.spoken_by(sources, weights, gate, cover_of(settings), text, job.device, product)
    elif settings.vocabulary == "union":
        spoken = spoken_in_union(sources, weights, text, job.device)
    else:
        spoken = spoken_by(sources, weights, gate, text, job.device, product)
    atomic_write(job.out / FILE, json.dumps({"on": reference, **spoken.plain()}, ensure_ascii=False) + "\n")
    return spoken.unmatched


def _can_be_shown(settings: EnsembleSettings, sources: list[Source]) -> bool:
    """Whether members have parts in every token: in mixtures and products of decoders."""
    from graft.ensemble.configuration import kind_of
    from graft.ensemble.members import config_of

    if settings.rule not in HAVE_PARTS:
        return False
    return kind_of([config_of(source.folder) for source in sources], settings.rule) == "CausalLM"


def _table(names: list[str], values: Any) -> dict[str, dict[str, float | None]]:
    """A matrix by names; None where a value is not finite."""
    rows = [dict(zip(names, (float(v) if abs(v) < float("inf") else None for v in row), strict=True)) for row in values]
    return dict(zip(names, rows, strict=True))


def _write_union(job: Job, sources: Sequence[Source], boundaries: int | None) -> dict[str, Any]:
    """Write the union's tokenizer; returns what the configuration is to hold of it."""
    from graft import models
    from graft.ensemble.union import union_of, write_tokenizer

    union = union_of([models.load_tokenizer(source.folder) for source in sources])
    write_tokenizer(union, sources[0].folder, job.out)
    return {"vocabulary": "union", "vocab_size": len(union.tokens), "boundaries": boundaries}


def _write(
    job: Job, settings: EnsembleSettings, sources: Sequence[Source], weights: list[float], gate: Any = None
) -> None:
    from graft.disk import atomic_write
    from graft.ensemble.configuration import EnsembleConfig
    from graft.ensemble.members import home_of

    entries = _entries(job, settings, sources)
    if settings.vocabulary == "bytes":
        config: Any = byte_configuration(settings, sources, entries, weights, job.out, gate)
        atomic_write(job.out / "config.json", json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")
        return
    copy_companions(companions(home_of(sources[0].folder)), job.out, stale=settings.vocabulary != "union")
    over = _write_union(job, sources, settings.boundaries) if settings.vocabulary == "union" else {}
    draft = next((source.name for source in sources if source.model == settings.draft), None)
    config = EnsembleConfig(entries, settings.rule, weights, settings.options, gate, draft=draft, **over)
    atomic_write(job.out / "config.json", json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def _entries(job: Job, settings: EnsembleSettings, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What the configuration says of each member; a self-contained ensemble has copies, each folder once."""
    from graft.ensemble.members import copied, member_entry

    own = settings.vocabulary != "same"
    if not settings.self_contained:
        return [member_entry(source, source.folder, job.target or job.out, own) for source in sources]
    copies: dict[Path, str] = {}
    places = [job.out / copied(source.folder, job.out, source.name, copies) for source in sources]
    return [member_entry(source, place, job.out, own) for source, place in zip(sources, places, strict=True)]
