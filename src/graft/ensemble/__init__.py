"""Ensembles: members whose predictions are combined at every token. One file a rule."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from graft.ensemble.settings import EnsembleSettings, FittedWeights
from graft.errors import Problem, SettingsError, UnknownName
from graft.evaluate.limits import named_length
from graft.methods import method, method_names
from graft.settings import Settings, parse
from graft.train.estimate import cpu_flops, on_this_cpu
from graft.train.memory import PROCESS
from graft.verb import Estimate, Facts, Job, Verb

ROOMS = (
    "agreed",
    "base",
    "byte_level",
    "caches",
    "candidates",
    "causal",
    "checks",
    "classification",
    "configuration",
    "contributions",
    "diversity",
    "dropout",
    "fitting",
    "gains",
    "gate",
    "greedy",
    "kept",
    "lanes",
    "members",
    "model",
    "outputs",
    "pending",
    "placed",
    "possible",
    "pulls",
    "reading",
    "recalled",
    "seq2seq",
    "settings",
    "show",
    "sources",
    "speculative",
    "spoken",
    "telling",
    "turns",
    "union",
    "union_said",
    "voting",
    "weights",
    "work",
)


TYPICAL = 500
"""Guess: tokens of a document."""

FITTING = 2
"""Counted up when the same settings fit other weights: ensembles whose weights are fitted are then made anew."""


class Ensemble(Verb[EnsembleSettings]):
    """Combines predictions; the members stay as they are."""

    name = "ensemble"
    summary = "Combine the predictions of several models at every token."
    reads = Verb.reads | {"quantised"}
    options_in = "combine"

    def types(self) -> Mapping[str, type[Settings]]:
        rules = method_names("graft.ensemble")
        return {"ensemble": EnsembleSettings, **{name: method("graft.ensemble", name).Settings for name in rules}}

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> EnsembleSettings:
        settings = parse(EnsembleSettings, raw, path)
        if len(settings.combine) != 1:
            found = ", ".join(settings.combine) or "none"
            raise SettingsError([Problem((*path, "combine"), f"expected one rule, found {found}")])
        if settings.rule not in method_names("graft.ensemble"):
            raise UnknownName("combining rule", settings.rule, method_names("graft.ensemble"))
        rule = method("graft.ensemble", settings.rule)
        options = parse(rule.Settings, settings.options, (*path, "combine", settings.rule))
        return settings.model_copy(update={"combine": {settings.rule: options.plain()}})

    def content(self, settings: EnsembleSettings) -> Any:
        fitted = isinstance(settings.weights, FittedWeights)
        return {**settings.content(), **({"fitting": FITTING} if fitted else {})}

    def check(self, settings: EnsembleSettings, models: Mapping[str, Facts]) -> list[str]:
        from graft.ensemble.checks import problems

        return problems(settings, models)

    def facts(self, settings: EnsembleSettings, models: Mapping[str, Facts], key: str) -> Facts:
        members = [models[name] for name in settings.names]
        first, (parameters, size) = members[0], _held(settings, models)
        return Facts(
            first.architecture,
            f"of:{key}",
            first.vocabulary if settings.vocabulary == "same" else f"{settings.vocabulary}:{key}",
            parameters,
            size,
            _config(settings, members),
            mergeable=False,
            trained_on=frozenset().union(*(m.trained_on for m in members)),
        )

    def estimate(self, settings: EnsembleSettings, models: Mapping[str, Facts]) -> Estimate:
        parameters, size = _held(settings, models)
        copied = size if settings.self_contained else 0
        seconds, note = copied / 5e8, "all members in memory at once"
        if isinstance(settings.weights, FittedWeights):
            seconds += _fitting_seconds(settings, settings.weights, models)
            note += f"; weights fitted on documents of about {TYPICAL} tokens of one data set, {on_this_cpu()}"
        return Estimate(parameters, copied, PROCESS + size, seconds, note)

    def shown(self, settings: EnsembleSettings) -> Collection[str]:
        fitted = getattr(settings.weights, "fit", None)
        return [settings.show] if settings.show is not None and settings.show != fitted else []

    def told(self, notes: Mapping[str, Any]) -> list[str]:
        from graft.ensemble.telling import lines

        return lines(notes["metrics"])

    def run(self, job: Job) -> dict[str, Any]:
        from graft.ensemble.work import run

        return run(job)


def _fitting_seconds(settings: EnsembleSettings, weights: FittedWeights, models: Mapping[str, Facts]) -> float:
    """Every member reads the text once, at 2 floating-point operations a parameter and token."""
    read = sum(
        models[entry.model].parameters * (entry.last_checkpoints or 1) * (entry.dropout.passes if entry.dropout else 1)
        for entry in settings.entries
    )
    return 2 * read * weights.documents * TYPICAL / cpu_flops()


def _config(settings: EnsembleSettings, members: Sequence[Facts]) -> dict[str, Any]:
    """What is known of the configuration: over tokens, an ensemble reads no more of them than its shortest member, and
    has the vocabulary that its members share; over bytes it reads texts of any length."""
    if settings.vocabulary == "bytes":
        return {}
    said = {"max_position_embeddings": [named_length(member.config) for member in members]}
    if settings.vocabulary == "same":
        said["vocab_size"] = [member.config.get("vocab_size") for member in members]
    known = {name: [value for value in values if value is not None] for name, values in said.items()}
    return {name: min(values) for name, values in known.items() if values}


def _times(settings: EnsembleSettings) -> dict[str, int]:
    """How often each model's weights are in memory: once, and once for each checkpoint (passes share them)."""
    found: dict[str, int] = {}
    for entry in settings.entries:
        found[entry.model] = found.get(entry.model, 0) + (entry.last_checkpoints or 1)
    return found


def _held(settings: EnsembleSettings, models: Mapping[str, Facts]) -> tuple[int, int]:
    """Parameters and bytes of the members' weights. A model below adapters is held once, for all of them and for itself
    as a member; how large adapters are is known beside the smallest member on that model."""
    held: dict[str, list[Facts]] = {}
    below = {models[name].frozen for name in settings.names} - {""}
    for name, count in _times(settings).items():
        facts = models[name]
        for number in range(count):
            own = f"{name} {number}" if number else facts.folder if facts.folder in below else name
            held.setdefault(facts.frozen or own, []).append(facts)
    least = [min(facts.bytes for facts in group) for group in held.values()]
    more = (facts.bytes - size for size, group in zip(least, held.values(), strict=True) for facts in group)
    return sum(max(facts.parameters for facts in group) for group in held.values()), sum(least) + sum(more)


VERB = Ensemble()
__all__ = ["VERB", "EnsembleSettings", "FittedWeights"]
