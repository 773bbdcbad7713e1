"""Candidates for an ensemble, read alone and one after the other: what each gives the text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graft.ensemble.configuration import kind_of
from graft.ensemble.fitting import held_out
from graft.ensemble.gains import Gains, gains
from graft.ensemble.members import config_of
from graft.ensemble.reading import common_context, pair_items, said, text_items
from graft.ensemble.sources import Source
from graft.errors import RequestError
from graft.evaluate.unseen import check_unseen


def predicted(
    folders: Mapping[str, Path],
    sets: Mapping[str, Any],
    reference: str,
    *,
    root: Path = Path(),
    documents: int = 200,
    seed: int = 0,
    device: str | None = None,
) -> Gains:
    """What mixtures of the models in `folders` would gain on `reference`, a data set of `sets` with its split.

    At most `documents` of each part, drawn by their hashes, are read, each cut to the shortest context of the models.
    Raises RequestError for models that do not write, CannotCombine for models that cut the text differently or were
    trained on it.
    """
    check_unseen(folders, [reference], sets, root)
    text = held_out(reference, documents, sets, root, device)
    sources = [Source(name, folder, name) for name, folder in folders.items()]
    kind = kind_of([config_of(source.folder) for source in sources])
    if kind == "SequenceClassification":
        raise RequestError("expected models that write, found classifiers")
    places = list(folders.values())
    items = text_items(places, text.texts) if kind == "CausalLM" else pair_items(places, text.records, text.format)
    context, width = common_context(places)
    told = [said(source, items, context=context, width=width, device=device) for source in sources]
    lengths = [min(len(item.target), context) for item in items]
    return gains(
        list(folders),
        np.stack([each.log_probs for each in told]),
        np.stack([each.best for each in told]),
        np.repeat(np.arange(len(items)), lengths),
        seed,
    )
