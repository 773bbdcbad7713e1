"""The first records of every file, read before work starts: what is wrong with a file shows there, nearly always."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from graft.data import sources
from graft.data.settings import Files, Source
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
    """What is wrong with the first records of the files: a sentence each, naming file and line."""
    if not isinstance(settings, Files):
        return []
    return [message for one in itertools.islice(_each(settings, root), FILES) if (message := _problem(one, root))]


def _each(settings: Files, root: Path) -> Iterator[Files]:
    """The settings once for each file."""
    groups = list(settings.groups())
    for split, path in sources.content_files(settings, root):
        alone: dict[str, list[str] | None] = dict.fromkeys(groups)
        alone[split or "path"] = [str(path)]
        yield settings.model_copy(update=alone)


def _problem(settings: Files, root: Path) -> str | None:
    try:
        for _ in itertools.islice(sources.read(settings, root), RECORDS):
            pass
    except DataError as error:
        return str(error)
    return None
