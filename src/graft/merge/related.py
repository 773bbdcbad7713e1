"""Whether models grew from one initialisation, where only their weights can tell: judged as `graft relate` does."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

from graft.checkpoint import TensorReader
from graft.errors import CannotCombine
from graft.kinship.evidence import Evidence, kin
from graft.merge.inputs import settled
from graft.merge.naming import Placed
from graft.merge.preflight import INSTEAD, Layout, anyway
from graft.merge.settings import MergeSettings
from graft.verb import Facts

_VERDICTS: dict[Hashable, Evidence] = {}
"""What was found out about two models in this process."""


def unrelated(settings: MergeSettings, plan: Layout, readers: Mapping[str, TensorReader]) -> list[str]:
    """Models that started from weights nobody knows more of, compared with the first: what was overridden, a sentence
    each.

    Raises CannotCombine where the mean of the weights is no model and that is not overridden.
    """
    wrong, found = [], {}
    for first, name, same_tokens in _pairs(settings, plan.facts):
        evidence = _judged(*_readers(settings, plan, readers, first, name), same_tokens)
        if evidence.test is not None:
            found[name] = round(evidence.test.value, 4)
        if not evidence.mean_is_a_model:
            wrong.append(_told(name, first, evidence, same_tokens and _aligns(plan.facts[name])))
    if found:
        plan.notes["correlation_of_weights"] = found
    if refused := anyway(settings, wrong):
        raise CannotCombine("\n".join(refused))
    return wrong


def strangers(settings: MergeSettings, models: Mapping[str, Facts]) -> list[str]:
    """What the weights that the models started from say before the models are there, a sentence each."""
    if settings.part is not None:
        # what corresponds to what is known when the tensors are placed
        return []
    wrong = []
    for first, name, same_tokens in _pairs(settings, models):
        starts = [models[model].start for model in (first, name)]
        if starts[0] is None or starts[1] is None:
            continue
        with TensorReader(starts[0]) as a, TensorReader(starts[1]) as b:
            evidence = _judged(a, b, same_tokens)
        if not evidence.mean_is_a_model:
            wrong.append(_told(name, first, evidence, same_tokens and _aligns(models[name])))
    return wrong


def _aligns(facts: Facts) -> bool:
    """Whether `rebasin` knows which units of such a model may change places."""
    return facts.architecture != "encoder-decoder"


def _judged(a: TensorReader, b: TensorReader, same_tokens: bool) -> Evidence:
    """The verdict of `kin`; a merge asks before anything is made and when its tensors are placed."""
    asked = (_content(a), _content(b), same_tokens)
    if asked not in _VERDICTS:
        _VERDICTS[asked] = kin(a, b, same_tokens=same_tokens)
    return _VERDICTS[asked]


def _content(reader: TensorReader) -> Hashable:
    """What is read under which name, and of which state of the files."""
    stamps = {file: file.stat().st_mtime_ns for file in {header.file for header in reader.headers.values()}}
    return frozenset((name, h.file, h.start, stamps[h.file]) for name, h in reader.headers.items())


def _pairs(settings: MergeSettings, models: Mapping[str, Facts]) -> Iterator[tuple[str, str, bool]]:
    """(first, another one, whether their tokens are the same) where only the weights tell."""
    if settings.method == "passthrough" or settings.aligns:
        return
    first, *others = settings.parents
    facts = settled(settings, models)
    for name in others:
        a, b = facts[first], facts[name]
        if a.initialisation != b.initialisation and "unknown" in (_kind(a), _kind(b)):
            unnamed = any(found.vocabulary.startswith("none:") for found in (a, b))
            yield first, name, unnamed or a.vocabulary == b.vocabulary


def _kind(facts: Facts) -> str:
    return facts.initialisation.partition(":")[0]


def _readers(
    settings: MergeSettings, plan: Layout, readers: Mapping[str, TensorReader], first: str, name: str
) -> tuple[TensorReader, TensorReader]:
    """The two models, what corresponds under one name; layers that are about to change places stay where they are."""
    if settings.slices:
        return readers[first], readers[name]
    both = {tensor: place for tensor, place in plan.places.items() if first in place and name in place}
    a, b = (Placed(readers[model], {t: place[model] for t, place in both.items()}) for model in (first, name))
    return a, b


def _told(name: str, first: str, evidence: Evidence, aligns: bool) -> str:
    assert evidence.test is not None
    value = evidence.test.value
    align = "`method: rebasin` matches their units first, and " if aligns else ""
    if evidence.found == "permuted":
        return (
            f"{name} and {first} are related, but {evidence.what}: the mean of their weights is no model; "
            f"{align}{INSTEAD}"
        )
    if evidence.found == "related":
        return f"only a trace is left of the common start of {name} and {first} (correlation {value:.3f}); {INSTEAD}"
    return (
        f"the weights of {name} and {first} have a correlation of {value:.3f}: they grew from different "
        f"initialisations, and the mean of their weights is no model; {align}{INSTEAD}"
    )
