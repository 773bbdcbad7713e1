"""Who speaks in a text of each mixture or product: read from the ensembles' folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from graft.ensemble.spoken import FILE, Spoken
from graft.report.read import Run


@dataclass(frozen=True)
class Speakers:
    """An ensemble with a text: the members in their colours, and the text with every member's part in each token."""

    model: str
    on: str
    legend: Markup
    words: Markup


def speakers(run: Run) -> Iterator[Speakers]:
    """Of every ensemble that shows a text; one that cannot be read is left out."""
    for name, model in run.models.items():
        path = None if model.folder is None else model.folder / FILE
        if path is None or not path.is_file():
            continue
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            spoken, on = Spoken.from_plain(plain), str(plain["on"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        # both are escaped where they are made
        yield Speakers(name, on, Markup(spoken.legend()), Markup(spoken.words()))
