"""What a split is read from: noted of what was trained on, so that it is known again under other settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from graft.data import hugging_face
from graft.data.corpus import AnyCorpus, Corpus, spans
from graft.data.settings import HuggingFace, PythonLibrary, Source
from graft.settings import Settings

MOST = 128
"""Hashes that are kept of a split: the lowest, so that two splits that share most of their files share some of them."""


class Content(Settings):
    """Files that a split is read from, and which of their documents are in it."""

    files: list[str]
    """The first 16 hexadecimal digits of each file's sha256, at most MOST of them. Where settings choose among what a
    file holds (a split of a Hugging Face data set, what is kept of the library), they are hashed with it."""
    cut: str
    """Hash of what says which documents there are in such files."""
    low: float
    high: float
    """A document is in the split if its own hash, as a share of the highest, is at least `low` and below `high`."""

    def meets(self, other: Content) -> bool:
        """Whether there may be a text in both. Files cut into other documents have other shares in every split."""
        apart = self.cut == other.cut and (self.high <= other.low or other.high <= self.low)
        return not apart and not set(self.files).isdisjoint(other.files)


def contents(corpus: AnyCorpus, split: str) -> list[Content]:
    """What `split` of a data set, or of all that it is mixed from, is read from."""
    return [content for part, _ in corpus.parts for content in _of(part, split)]


def _of(corpus: Corpus, split: str) -> Iterator[Content]:
    groups: dict[str | None, list[str]] = {}
    for place, digest in corpus.hashes:
        groups.setdefault(place, []).append(_salted(digest, corpus.settings, split))
    by_hash = spans(corpus.settings, {place for place in groups if place is not None})[split]
    for place, files in groups.items():
        low, high = by_hash if place is None else (0.0, float(place == split))
        if low < high:
            yield Content(files=sorted(set(files))[:MOST], cut=_cut(corpus), low=low, high=high)


def _salted(digest: str, settings: Source, split: str) -> str:
    if isinstance(settings, PythonLibrary):
        digest = hashlib.sha256(f"{settings.keep} {digest}".encode()).hexdigest()
    if isinstance(settings, HuggingFace):
        theirs = hugging_face.OURS.get(settings.split or split, settings.split)
        digest = hashlib.sha256(json.dumps([settings.subset, theirs, digest]).encode()).hexdigest()
    return digest[:16]


def _cut(corpus: Corpus) -> str:
    plain = corpus.settings.plain()
    fields = {ours: theirs for ours, theirs in plain.get("fields", {}).items() if ours != theirs}
    said: dict[str, Any] = {name: plain[name] for name in ("source", "document", "separator", "keep") if name in plain}
    return hashlib.sha256(json.dumps([corpus.format, fields, said], sort_keys=True).encode()).hexdigest()[:16]
