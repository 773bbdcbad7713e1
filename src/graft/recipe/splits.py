"""Whether the splits that a recipe reads have documents, as far as the first records tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from graft import evaluate
from graft.data import DataSettings, has_dev, open_corpus, split_ref
from graft.recipe.measures import Measures
from graft.recipe.problems import Problems
from graft.recipe.sections import Node
from graft.train.settings import TrainSettings


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


def _named(nodes: Mapping[str, Node], measures: Measures) -> Iterator[tuple[str, str, bool]]:
    """(data set, split, whether a model is trained on it)."""
    for node in nodes.values():
        for reference in node.data:
            yield *split_ref(reference), isinstance(node.settings, TrainSettings)
    for measure in measures.values():
        for reference in measure.on if isinstance(measure, evaluate.OnData) else ():
            yield *split_ref(reference), False
