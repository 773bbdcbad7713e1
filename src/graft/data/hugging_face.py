"""Hugging Face data sets: a folder on this machine, or an id on the hub, read at one commit."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft import hub
from graft.data.settings import HuggingFace
from graft.errors import DataError, RequestError

OURS = {"train": "train", "validation": "dev", "valid": "dev", "dev": "dev", "test": "test"}
"""Our name of a split, by theirs."""
ORDER = ("test", "dev", "train", None)
"""Splits are read so: of exact duplicates the first is kept, and a benchmark stays whole."""
ABOUT = ("README.md", ".gitattributes")
"""Files of a data set on the hub that hold none of its data."""

Rows = Iterator[dict[str, Any]]


def files(settings: HuggingFace, root: Path) -> list[Path]:
    """The files of a data set that is a folder; none of one on the hub."""
    place = root / settings.name
    return sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith("cache-"))


def commit(settings: HuggingFace, root: Path) -> str | None:
    """The commit on the hub that is read, the same until `look_again`; None for a folder. Raises DataError as `splits`.

    Without the network it is the one that this machine's cache knows of.
    """
    return None if (root / settings.name).is_dir() else _on_hub(settings, root)[1]


def look_again() -> None:
    """Forget which commits the ids stand for: there may be new ones."""
    _found.cache_clear()


def splits(settings: HuggingFace, root: Path) -> list[tuple[str, str | None, Rows]]:
    """(its name, the split of ours that it is or None, its rows) of every split that the settings ask for.

    Raises DataError, saying what to do, for a data set or split that is not there; the rows raise it where they cannot
    be read.
    """
    with _told(settings.name):
        found = _load(settings, root)
    if settings.split is None:
        named = [(name, OURS.get(name), _rows(settings.name, rows)) for name, rows in found.items()]
        return sorted(named, key=lambda split: ORDER.index(split[1]))
    if settings.split not in found:
        raise DataError(f"{settings.name}: no split {settings.split!r}; there are: {', '.join(found)}")
    return [(settings.split, None, _rows(settings.name, found[settings.split]))]


def _load(settings: HuggingFace, root: Path) -> dict[str, Any]:
    """The splits by name."""
    import datasets

    place = root / settings.name
    if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
        loaded = datasets.load_from_disk(str(place))
    else:
        name, at = (str(place), None) if place.is_dir() else _on_hub(settings, root)
        loaded = datasets.load_dataset(name, settings.subset, revision=at, streaming=True)
    return dict(loaded) if isinstance(loaded, dict) else {"all": loaded}


def _on_hub(settings: HuggingFace, root: Path) -> tuple[str, str]:
    """(what `datasets` shall load, commit) of an id."""
    if not settings.hub:
        place = root / settings.name
        raise DataError(f"{place}: expected a folder; for a data set on the hub write `hub: true` beside its name")
    return _found(settings.name, settings.revision)


@functools.cache
def _found(name: str, revision: str | None) -> tuple[str, str]:
    """The id, or the folder in the hub's cache where all of the data set is there, and its commit."""
    try:
        folder = hub.snapshot(name, revision, ABOUT, kind="dataset")
    except RequestError as error:
        raise DataError(str(error)) from None
    whole = hub.whole(name, folder.name, kind="dataset")
    data = whole is not None and any(path.is_file() and path.name not in ABOUT for path in whole.rglob("*"))
    return (str(whole) if data else name), folder.name


def _rows(name: str, rows: Iterable[Any]) -> Rows:
    with _told(name):
        yield from map(dict, rows)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Errors of `datasets` and of the way to the hub are told as DataError."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(f"{name}: expected a data set, found none that loads: {_why(error)}") from None


def _why(error: Exception) -> str:
    """What is wrong, in words, and what to do."""
    if isinstance(error, ConnectionError):
        return "the hub cannot be reached, and this machine's cache does not hold all of it: check the connection"
    return " ".join(str(error).split()) or type(error).__name__
