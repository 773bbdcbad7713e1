"""What is wrong with an ensemble, said before anything runs: from the settings and the facts of the members. Light."""

from __future__ import annotations

from collections.abc import Mapping

from graft.data.objectives import is_prefix_lm
from graft.ensemble.byte_level.work import problems as byte_problems
from graft.ensemble.settings import HAVE_PARTS, MOVE, NOT_A_MIXTURE, EnsembleSettings, FittedWeights, GateSettings
from graft.ensemble.sources import short_names
from graft.errors import RequestError
from graft.methods import method
from graft.settings import parse
from graft.verb import Facts

SHARED = ("least_risk", "linear", "log_linear", "majority", "ranked")
"""Rules under which a member's weight may be shared out among several."""


def _unlike(name: str, first: str, models: Mapping[str, Facts]) -> str:
    """Why the predictions of two members cannot be matched token by token."""
    if lost := [model for model in (name, first) if models[model].vocabulary.startswith("none:")]:
        return (
            f"{' and '.join(lost)}: expected a tokenizer beside the weights, found none: whether tokens are the same "
            "cannot be known; put its tokenizer.json into the folder"
        )
    return (
        f"{name} and {first} have different vocabularies: their predictions cannot be matched token by token; "
        "use `vocabulary: bytes`, or for a mixture `vocabulary: union`"
    )


def problems(settings: EnsembleSettings, models: Mapping[str, Facts]) -> list[str]:
    """What is wrong with an ensemble of these members, a sentence each."""
    found = []
    first = settings.names[0]
    for name in settings.names[1:]:
        if models[name].vocabulary != models[first].vocabulary and settings.vocabulary == "same":
            found.append(_unlike(name, first, models))
        if models[name].architecture != models[first].architecture and not _moved(settings, models):
            found.append(f"{name} is {_kind_of(models[name])} and {first} is {_kind_of(models[first])}")
    if models[first].architecture == "encoder":
        found += _classifier_problems(settings, models)
    if models[first].architecture == "encoder-decoder":
        found += _other_than_decoders(settings, "encoder-decoders")
    found += _prefix_problems(settings, models)
    if settings.vocabulary == "union":
        found += _union_problems(settings)
    elif settings.boundaries is not None:
        found.append(f"`boundaries` is for a union of vocabularies, found `vocabulary: {settings.vocabulary}`")
    found += byte_problems(settings)
    found += _name_problems(settings)
    found += _several_problems(settings)
    found += _device_problems(settings)
    if settings.show is not None and (settings.rule not in HAVE_PARTS or models[first].architecture != "decoder"):
        found.append(
            f"`show` is for mixtures and products ({', '.join(HAVE_PARTS)}) of decoders: only there members have parts "
            "in every token"
        )
    if not isinstance(settings.weights, FittedWeights):
        wrong = method("graft.ensemble", settings.rule).problem(constants(settings))
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
    if isinstance(settings.weights, FittedWeights) and settings.weights.top_k is not None:
        found.append("`top_k` is for products of models with many tokens, found classifiers: leave it out")
    return found


def _other_than_decoders(settings: EnsembleSettings, what: str) -> list[str]:
    found = []
    if settings.vocabulary != "same":
        found.append(f"`vocabulary: {settings.vocabulary}` is for decoders, found {what}")
    if settings.draft is not None:
        found.append(f"speculation is for decoders, found {what}: leave the draft out")
    return found


def _union_problems(settings: EnsembleSettings) -> list[str]:
    if settings.rule != "linear":
        return [NOT_A_MIXTURE.format(settings.rule)]
    if isinstance(settings.weights, FittedWeights) and settings.weights.gate is not None:
        return ["a gate is for members of one vocabulary, found a union: leave the gate out"]
    return []


def _prefix_problems(settings: EnsembleSettings, models: Mapping[str, Facts]) -> list[str]:
    """Where members that read a prompt both ways cannot be told where it ends."""
    name = next((name for name in settings.names if is_prefix_lm(models[name].config)), None)
    if name is None or (settings.vocabulary == "same" and settings.draft is None):
        return []
    way = f"`vocabulary: {settings.vocabulary}`" if settings.draft is None else "a draft"
    return [
        f"{name} is a prefix LM, which reads a prompt both ways, and {way} has all members read from left to right: "
        "leave it out, or tune the member with `objective: causal` first"
    ]


def _name_problems(settings: EnsembleSettings) -> list[str]:
    """Members that would be called the same: one folder, loaded in two ways."""
    short = short_names(settings.names)
    names = [short[entry.model] for entry in settings.entries if entry.checkpoint is None and not entry.several]
    return [
        f"expected members of different names, found {name} twice: name one by a link to its folder"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]


def _several_problems(settings: EnsembleSettings) -> list[str]:
    """What is wrong with entries that stand for several members."""
    several = [entry.model for entry in settings.entries if entry.several]
    if several and settings.rule not in SHARED:
        return [f"{several[0]} stands for several members, which share a weight: {settings.rule} takes single ones"]
    if settings.draft in several:
        return [f"expected one member as draft, found {settings.draft}, which stands for several"]
    return []


def _device_problems(settings: EnsembleSettings) -> list[str]:
    """Devices of members that this machine does not have."""
    from graft.models import check_device

    found = []
    for entry in settings.entries:
        try:
            check_device(entry.device)
        except RequestError as error:
            found.append(f"{entry.model}: {error}")
    return found


def _fit_problems(settings: EnsembleSettings) -> list[str]:
    assert isinstance(settings.weights, FittedWeights)
    if settings.rule != "linear" and settings.weights.gate is not None:
        return [f"a gate gives the weights of a mixture (linear), found {settings.rule!r}: leave the gate out"]
    found = _gate_problems(settings.names, settings.weights.gate)
    if settings.weights.top_k is not None and (settings.rule != "log_linear" or settings.vocabulary == "bytes"):
        where = "over bytes" if settings.vocabulary == "bytes" else f"with {settings.rule}"
        found.append(
            f"`top_k` is for products (log_linear) of models with many tokens, found it {where}: what those need is "
            "little already, leave it out"
        )
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


def constants(settings: EnsembleSettings) -> list[float]:
    """The weights of the entries, where they need no fitting: those given, else the rule's own."""
    if settings.given is not None:
        return settings.given
    rule = method("graft.ensemble", settings.rule)
    return rule.default(len(settings.entries), parse(rule.Settings, settings.options))
