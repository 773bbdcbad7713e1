"""What making an ensemble does: weights (given or fitted), a configuration that names the members, a tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graft.ensemble.byte_level.work import configuration as byte_configuration
from graft.ensemble.byte_level.work import problems as byte_problems
from graft.ensemble.settings import MOVE, NOT_A_MIXTURE, EnsembleSettings, FittedWeights, GateSettings
from graft.ensemble.sources import Source, sources_of
from graft.methods import method
from graft.settings import parse
from graft.verb import Facts, Job

SHARED = ("least_risk", "linear", "log_linear", "majority", "ranked")
"""Rules under which a member's weight may be shared out among several."""

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
                "use `vocabulary: bytes`, or for a mixture `vocabulary: union`"
            )
        if models[name].architecture != models[first].architecture and not _moved(settings, models):
            found.append(f"{name} is {_kind_of(models[name])} and {first} is {_kind_of(models[first])}")
    if models[first].architecture == "encoder":
        found += _classifier_problems(settings, models)
    if models[first].architecture == "encoder-decoder":
        found += _other_than_decoders(settings, "encoder-decoders")
    if settings.vocabulary == "union":
        found += _union_problems(settings)
    found += byte_problems(settings)
    found += _several_problems(settings)
    if settings.show is not None and (
        settings.rule != "linear" or settings.vocabulary != "same" or models[first].architecture != "decoder"
    ):
        found.append("`show` is for mixtures (linear) of decoders of one vocabulary: only there members share a token")
    if not isinstance(settings.weights, FittedWeights):
        wrong = method("graft.ensemble", settings.rule).problem(_constants(settings))
        found += [wrong] if wrong else []
    if isinstance(settings.weights, FittedWeights):
        found += _fit_problems(settings)
    return found


def _kind_of(facts: Facts) -> str:
    return {"decoder": "a decoder"}.get(facts.architecture, f"an {facts.architecture}")


def _moved(settings: EnsembleSettings, models: Mapping[str, Facts]) -> bool:
    """Whether decoders move an encoder-decoder (by their rule's arithmetic): the only kinds that may be mixed."""
    first, *others = [models[name].architecture for name in settings.names]
    return settings.rule in MOVE and first == "encoder-decoder" and set(others) == {"decoder"}


def _classifier_problems(settings: EnsembleSettings, models: Mapping[str, Facts]) -> list[str]:
    """What is wrong with an ensemble of encoders: only those that classify can be combined."""
    for name in settings.names:
        if not any("ForSequenceClassification" in each for each in models[name].config.get("architectures") or ()):
            return [f"an ensemble needs decoders, which predict token by token, or classifiers; {name} is an encoder"]
    found = _other_than_decoders(settings, "classifiers")
    if settings.rule == "least_risk":
        found.append("least_risk chooses among texts that members write, found classifiers: use majority or ranked")
    if isinstance(settings.weights, FittedWeights) and settings.weights.gate and settings.weights.gate.hidden_states:
        found.append("a gate sees hidden states of members that write, found classifiers: leave `hidden_states` out")
    return found


def _other_than_decoders(settings: EnsembleSettings, what: str) -> list[str]:
    found = []
    gate = settings.weights.gate if isinstance(settings.weights, FittedWeights) else None
    if gate is not None and gate.looks_at is not None:
        found.append(f"`looks_at` leaves members out while decoders write, found {what}: leave it out")
    if settings.vocabulary != "same":
        found.append(f"`vocabulary: {settings.vocabulary}` is for decoders, found {what}")
    if settings.draft is not None:
        found.append(f"speculation is for decoders, found {what}: leave the draft out")
    return found


def _union_problems(settings: EnsembleSettings) -> list[str]:
    if settings.rule != "linear":
        return [NOT_A_MIXTURE.format(settings.rule)]
    if isinstance(settings.weights, FittedWeights):
        return ["weights are fitted for members of one vocabulary: give those of a union beside the members"]
    return []


def _constants(settings: EnsembleSettings) -> list[float]:
    """The weights of the entries, where they need no fitting: those given, else the rule's own."""
    if settings.given is not None:
        return settings.given
    rule = method("graft.ensemble", settings.rule)
    return rule.default(len(settings.entries), parse(rule.Settings, settings.options))


def _several_problems(settings: EnsembleSettings) -> list[str]:
    """What is wrong with entries that stand for several members."""
    several = [entry.model for entry in settings.entries if entry.several]
    if several and settings.rule not in SHARED:
        return [f"{several[0]} stands for several members, which share a weight: {settings.rule} takes single ones"]
    if settings.draft in several:
        return [f"expected one member as draft, found {settings.draft}, which stands for several"]
    return []


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
    sources = sources_of(settings, job.models, job.seed)
    names = [source.name for source in sources]
    if not isinstance(settings.weights, FittedWeights):
        weights = [_constants(settings)[source.entry] * source.share for source in sources]
        _write(job, settings, sources, weights)
        _show(job, settings, sources, weights, None)
        return {"weights": dict(zip(names, weights, strict=True))}
    from graft.ensemble.fitting import fit_weights

    fit = fit_weights(settings, settings.weights, job, sources)
    weights = [float(weight) for weight in fit.weights]
    _write(job, settings, sources, weights, fit.gate)
    _show(job, settings, sources, weights, fit.gate)
    return {
        "weights": dict(zip(names, weights, strict=True)),
        "loss": fit.loss,
        "member_losses": dict(zip(names, map(float, fit.members), strict=True)),
        "steps": fit.steps,
        "gap": fit.gap,
        "contributions": {name: asdict(each) for name, each in zip(names, fit.contributions, strict=False)},
        **({} if fit.correlation is None else {"error_correlation": _table(names, fit.correlation)}),
        **({} if fit.gate is None else {"loss_without_gate": fit.constant}),
        **({} if fit.gate is None else {"needed": {names[at]: share for at, share in fit.run.items()}}),
    }


SHOWN = 2000
"""Characters of a document that are shown at most."""


def _show(job: Job, settings: EnsembleSettings, sources: list[Source], weights: list[float], gate: Any) -> None:
    """Write who speaks in the first document of what is to be shown, for the report."""
    fitted = settings.weights.fit if isinstance(settings.weights, FittedWeights) else None
    reference = settings.show or fitted
    if reference is None or not _can_be_shown(settings, sources):
        return
    from graft.checkpoint import atomic_write
    from graft.ensemble.fitting import held_out
    from graft.ensemble.show import spoken_by
    from graft.ensemble.spoken import FILE

    texts = held_out(reference, 1, job.data, job.root, job.device).texts
    text = next((text[:SHOWN] for text in texts if text.strip()), None)
    if text is None:
        return
    spoken = spoken_by(sources, weights, gate, text, job.device)
    atomic_write(job.out / FILE, json.dumps({"on": reference, **spoken.plain()}, ensure_ascii=False) + "\n")


def _can_be_shown(settings: EnsembleSettings, sources: list[Source]) -> bool:
    """Whether members share in every token: in mixtures of decoders of one vocabulary."""
    from graft.ensemble.configuration import kind_of
    from graft.ensemble.members import config_of

    if settings.rule != "linear" or settings.vocabulary != "same":
        return False
    return kind_of([config_of(source.folder) for source in sources]) == "CausalLM"


def _table(names: list[str], values: Any) -> dict[str, dict[str, float | None]]:
    """A matrix by names; None where a value is not finite."""
    rows = [dict(zip(names, (float(v) if abs(v) < float("inf") else None for v in row), strict=True)) for row in values]
    return dict(zip(names, rows, strict=True))


def _write_union(job: Job, sources: Sequence[Source]) -> dict[str, Any]:
    """Write the union's tokenizer; returns what the configuration is to hold of it."""
    from graft import models
    from graft.ensemble.union import union_of, write_tokenizer

    union = union_of([models.load_tokenizer(source.folder) for source in sources])
    write_tokenizer(union, sources[0].folder, job.out)
    return {"vocabulary": "union", "vocab_size": len(union.tokens)}


def _write(
    job: Job, settings: EnsembleSettings, sources: Sequence[Source], weights: list[float], gate: Any = None
) -> None:
    from graft.checkpoint import atomic_write
    from graft.ensemble.configuration import EnsembleConfig
    from graft.ensemble.members import home_of

    entries = _entries(job, settings, sources)
    if settings.vocabulary == "bytes":
        config: Any = byte_configuration(settings, sources, entries, weights, job.out)
        atomic_write(job.out / "config.json", json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")
        return
    first = home_of(sources[0].folder)
    for file in TOKENIZER_FILES:
        if (first / file).exists():
            shutil.copyfile(first / file, job.out / file)
    over = _write_union(job, sources) if settings.vocabulary == "union" else {}
    draft = next((source.name for source in sources if source.model == settings.draft), None)
    config = EnsembleConfig(entries, settings.rule, weights, settings.options, gate, draft=draft, **over)
    atomic_write(job.out / "config.json", json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def _entries(job: Job, settings: EnsembleSettings, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What the configuration says of each member; a self-contained ensemble has copies, each folder once."""
    from graft.ensemble.members import copied, member_entry

    if not settings.self_contained:
        return [member_entry(source, source.folder, job.target or job.out) for source in sources]
    copies: dict[Path, str] = {}
    places = [job.out / copied(source.folder, job.out, source.name, copies) for source in sources]
    return [member_entry(source, place, job.out) for source, place in zip(sources, places, strict=True)]
