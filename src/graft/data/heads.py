"""The first records of every file, read before work starts: what is wrong with a file shows there, nearly always."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from graft.data import hugging_face, sources
from graft.data.settings import Files, HuggingFace, Source
from graft.errors import DataError

RECORDS = 1000
"""Read of each file; what stands further down is found, with its line, when it is reached."""
FILES = 100
"""Looked into, of a data set of many files."""
CHARACTERS = 1 << 24
"""Of text in the first records of a data set."""


class Head:
    """The first records of a data set; `whole` once they have turned out to be all that there are."""

    def __init__(self, settings: Source, root: Path):
        self.settings, self.root, self.whole = settings, root, False

    def __iter__(self) -> Iterator[sources.Tagged]:
        held = 0
        for number, (split, record) in enumerate(sources.read(self.settings, self.root)):
            held += sum(len(value) for value in record.values() if isinstance(value, str))
            if number == RECORDS or held > CHARACTERS:
                return
            yield split, record
        self.whole = True


def problems(settings: Source, root: Path) -> list[str]:
    """What is wrong with the first records of the files, or splits: a sentence each, naming file and line."""
    try:
        each = list(itertools.islice(_each(settings, root), FILES))
    except DataError as error:
        return [str(error)]
    return [message for one in each if (message := _problem(one, root))]


def _each(settings: Source, root: Path) -> Iterator[Source]:
    """The settings once for each file, or for each split on Hugging Face."""
    if isinstance(settings, HuggingFace):
        hugging_face.look_again()
        yield from (settings.model_copy(update={"split": name}) for name, *_ in hugging_face.splits(settings, root))
    if not isinstance(settings, Files):
        return
    groups = list(settings.groups())
    for split, path in sources.content_files(settings, root):
        alone: dict[str, list[str] | None] = dict.fromkeys(groups)
        alone[split or "path"] = [str(path)]
        yield settings.model_copy(update=alone)


def _problem(settings: Source, root: Path) -> str | None:
    try:
        for _ in itertools.islice(sources.read(settings, root), RECORDS):
            pass
    except DataError as error:
        return str(error)
    return None
