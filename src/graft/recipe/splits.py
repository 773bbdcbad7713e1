"""Whether the splits that a recipe reads have documents, as far as the first records tell."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from graft import evaluate
from graft.data import DataSettings, has_dev, open_corpus, split_ref
from graft.recipe.measures import Measures
from graft.recipe.problems import Problems
from graft.recipe.sections import Node
from graft.train.settings import TrainSettings, strange


def check_splits(
    sets: Mapping[str, DataSettings],
    nodes: Mapping[str, Node],
    measures: Measures,
    sound: Collection[str],
    root: Path,
    problems: Problems,
) -> None:
    """Note every data set, of those that are `sound`, without documents in a split that is read, or without anything to
    learn in one that is trained on; each split once."""
    for name, node in nodes.items():
        wanted = node.settings.wanted_dev() if isinstance(node.settings, TrainSettings) else {}
        for reference, message in wanted.items():
            where = split_ref(reference)[0]
            if where in sound and not has_dev(open_corpus(sets, where, root)):
                problems.note(("models", name, node.verb.name, "mixing", "learn"), message)
        for task, reference, labels, head in _labels(node):
            if split_ref(reference)[0] in sound and (wrong := _strange(sets, root, task, reference, labels, head)):
                problems.note(("models", name, node.verb.name, "tasks", task, "labels"), wrong)
    read: dict[str, set[str]] = defaultdict(set)
    learned: dict[str, set[str]] = defaultdict(set)
    for name, split, trains in _named(nodes, measures):
        if name in sound:
            corpus = open_corpus(sets, name, root)
            for part, _ in corpus.parts:
                named = {split, "dev"} if trains and has_dev(corpus) else {split}
                read[part.name] |= named
                learned[part.name] |= named if trains else set()
    for name, splits in read.items():
        corpus = open_corpus(sets, name, root)
        for part, _ in corpus.parts:
            found = problems.attempt(
                ("data", name),
                lambda: [*part.lacking(splits), *part.unanswered(learned[part.name])],  # noqa: B023
            )
            for message in found or ():
                problems.note(("data", name), message)


LABELLED = {"labelled": "classification", "tagged": "tagging"}
"""The kind of head that learns labels from data of a format."""


def _labels(node: Node) -> Sequence[tuple[str, str, Sequence[str], str]]:
    return node.settings.wanted_labels() if isinstance(node.settings, TrainSettings) else []


def _strange(
    sets: Mapping[str, DataSettings], root: Path, task: str, reference: str, labels: Sequence[str], head: str
) -> str:
    """Which label of the first records that a task learns from, or is measured on, it does not name; empty if none."""
    name, split = split_ref(reference)
    corpus = open_corpus(sets, name, root)
    if LABELLED.get(corpus.format) != head:
        return ""
    from graft.data.examples import labels_in

    firsts = itertools.chain.from_iterable(part.first() for part, _ in corpus.parts)
    return strange(task, labels, labels_in(head, (record for place, record in firsts if place in (split, "dev"))))


def _named(nodes: Mapping[str, Node], measures: Measures) -> Iterator[tuple[str, str, bool]]:
    """(data set, split, whether a model is trained on it)."""
    for node in nodes.values():
        for reference in node.data:
            yield *split_ref(reference), isinstance(node.settings, TrainSettings)
    for measure in measures.values():
        for reference in measure.on if isinstance(measure, evaluate.OnData) else ():
            yield *split_ref(reference), False
