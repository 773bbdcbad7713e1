"""About how much text a data set has: from the sizes of its files and, where it is limited, its first records."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from graft.data import sources
from graft.data.corpus import AnyCorpus, Corpus, text_of
from graft.data.files import COMPRESSED
from graft.data.settings import PythonLibrary

UNPACKED = 3.5
"""Guess: bytes of text for each byte of a file that is compressed (Parquet files are as well)."""
KEPT = {"code": 1.0, "docstrings": 0.13, "tokens": 0.74, "packages": 0.03}
"""Share of the library's text that is kept, as counted in that of Python 3.11."""
LOOKED_AT = 100
"""Records by whose length those of a limited data set are judged."""


def text_bytes(corpus: AnyCorpus, split: str) -> float | None:
    """About how many bytes of text a split has, all parts of a mixture together; None where no file tells."""
    found = [_of_part(part, split) for part, _ in corpus.parts]
    return None if None in found else float(sum(size for size in found if size is not None))


def _of_part(corpus: Corpus, split: str) -> float | None:
    placed = sources.content_files(corpus.settings, corpus.root)
    if not placed:
        return None
    given = {place for place, _ in placed if place is not None}
    shared = _share(corpus, split, given) * _limited(corpus, _size([p for place, p in placed if place is None]))
    own = _size([path for place, path in placed if place == split])
    kept = KEPT[corpus.settings.keep] if isinstance(corpus.settings, PythonLibrary) else 1.0
    return kept * shared + (_limited(corpus, own) if own else 0.0)


def _size(paths: Sequence[Path]) -> float:
    return float(sum(path.stat().st_size * (UNPACKED if _packed(path) else 1) for path in paths))


def _packed(path: Path) -> bool:
    return path.suffix in (*COMPRESSED, ".parquet")


def _share(corpus: Corpus, split: str, given: set[str]) -> float:
    """Of what is split by hash: nothing goes into a dev or test split that is given."""
    shares = {s: 0.0 if s in given else getattr(corpus.settings.splits, s) for s in ("dev", "test")}
    return shares.get(split, 1.0 - sum(shares.values()))


def _limited(corpus: Corpus, size: float) -> float:
    """No more than `limit` documents of the length of the first ones."""
    if corpus.settings.limit is None or size == 0:
        return size
    lengths = [len(text_of(record)) for _, record in itertools.islice(corpus.first(), LOOKED_AT)]
    return min(size, corpus.settings.limit * sum(lengths) / max(len(lengths), 1))
