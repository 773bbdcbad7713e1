"""What making an ensemble does: weights (given or fitted), a configuration that names the members, a tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graft.ensemble.settings import NOT_A_MIXTURE, EnsembleSettings, FittedWeights, GateSettings
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
        if models[name].vocabulary != models[first].vocabulary and settings.vocabulary == "same":
            found.append(
                f"{name} and {first} have different vocabularies: their predictions cannot be matched token by token; "
                "a mixture can be made over `vocabulary: union`"
            )
        if models[name].architecture != models[first].architecture:
            found.append(f"{name} is a {models[name].architecture} and {first} a {models[first].architecture}")
    if models[first].architecture == "encoder":
        found.append(f"an ensemble needs decoders, which predict token by token; {first} is an encoder")
    if models[first].architecture == "encoder-decoder":
        found += _translator_problems(settings)
    if settings.vocabulary == "union":
        found += _union_problems(settings)
    if not isinstance(settings.weights, FittedWeights):
        wrong = method("graft.ensemble", settings.rule).problem(_constants(settings))
        found += [wrong] if wrong else []
    if isinstance(settings.weights, FittedWeights):
        found += _fit_problems(settings)
    return found


def _translator_problems(settings: EnsembleSettings) -> list[str]:
    found = []
    if isinstance(settings.weights, FittedWeights):
        found.append("weights are fitted for decoders: give those of encoder-decoders beside the members")
    if settings.vocabulary == "union":
        found.append("a union of vocabularies is for decoders, found encoder-decoders")
    if settings.draft is not None:
        found.append("speculation is for decoders, found encoder-decoders: leave the draft out")
    return found


def _union_problems(settings: EnsembleSettings) -> list[str]:
    if settings.rule != "linear":
        return [NOT_A_MIXTURE.format(settings.rule)]
    if isinstance(settings.weights, FittedWeights):
        return ["weights are fitted for members of one vocabulary: give those of a union beside the members"]
    return []


def _constants(settings: EnsembleSettings) -> list[float]:
    """The weights, where they need no fitting: those given, else the rule's own."""
    if settings.given is not None:
        return settings.given
    rule = method("graft.ensemble", settings.rule)
    return rule.default(len(settings.names), parse(rule.Settings, settings.options))


def _fit_problems(settings: EnsembleSettings) -> list[str]:
    assert isinstance(settings.weights, FittedWeights)
    if settings.rule != "linear" and settings.weights.gate is not None:
        return [f"a gate gives the weights of a mixture (linear), found {settings.rule!r}: leave the gate out"]
    found = _gate_problems(settings.names, settings.weights.gate)
    if settings.rule in ("linear", "log_linear"):
        return found
    return [f"weights can be fitted for linear and log_linear, found {settings.rule!r}: give its options"]


def _gate_problems(names: list[str], gate: GateSettings | None) -> list[str]:
    if gate is None or not gate.skip:
        return []
    if len(gate.looks_at or names) == len(names):
        return ["`skip` is for a gate that looks at some members and decides about the others: set `looks_at`"]
    if gate.skip * len(names) >= 1:
        return [f"expected `skip` below 1 / {len(names)}, so that a member is always left, found {gate.skip:g}"]
    return []


def run(job: Job) -> dict[str, Any]:
    """Write the ensemble's folder into `job.out`; returns the weights and, where fitted, the losses (nats a token)."""
    settings = job.settings
    assert isinstance(settings, EnsembleSettings)
    if not isinstance(settings.weights, FittedWeights):
        weights = _constants(settings)
        _write(job, settings, weights)
        return {"weights": dict(zip(settings.names, weights, strict=True))}
    from graft.ensemble.fitting import fit_weights

    fit = fit_weights(settings, settings.weights, job)
    weights = [float(weight) for weight in fit.weights]
    _write(job, settings, weights, fit.gate)
    return {
        "weights": dict(zip(settings.names, weights, strict=True)),
        "loss": fit.loss,
        "member_losses": dict(zip(settings.names, map(float, fit.members), strict=True)),
        "steps": fit.steps,
        "gap": fit.gap,
        "contributions": {name: asdict(each) for name, each in zip(settings.names, fit.contributions, strict=False)},
        **({} if fit.correlation is None else {"error_correlation": _table(settings.names, fit.correlation)}),
        **({} if fit.gate is None else {"loss_without_gate": fit.constant}),
        **({} if fit.gate is None else {"needed": {settings.names[at]: share for at, share in fit.run.items()}}),
    }


def _table(names: list[str], values: Any) -> dict[str, dict[str, float | None]]:
    """A matrix by names; None where a value is not finite."""
    rows = [dict(zip(names, (float(v) if abs(v) < float("inf") else None for v in row), strict=True)) for row in values]
    return dict(zip(names, rows, strict=True))


def _write_union(job: Job, settings: EnsembleSettings) -> dict[str, Any]:
    """Write the union's tokenizer; returns what the configuration is to hold of it."""
    from graft import models
    from graft.ensemble.union import union_of, write_tokenizer

    union = union_of([models.load_tokenizer(job.models[name]) for name in settings.names])
    write_tokenizer(union, job.models[settings.names[0]], job.out)
    return {"vocabulary": "union", "vocab_size": len(union.tokens)}


def _write(job: Job, settings: EnsembleSettings, weights: list[float], gate: Any = None) -> None:
    from graft.checkpoint import atomic_write
    from graft.ensemble.configuration import EnsembleConfig
    from graft.ensemble.members import member_entry

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
    over = _write_union(job, settings) if settings.vocabulary == "union" else {}
    config = EnsembleConfig(entries, settings.rule, weights, settings.options, gate, draft=settings.draft, **over)
    atomic_write(job.out / "config.json", json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")
