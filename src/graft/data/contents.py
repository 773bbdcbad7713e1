"""What a split is read from: noted of what was trained on, so that it is known again under other settings, and in files
of another kind."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from graft.data import hugging_face
from graft.data.corpus import AnyCorpus, Corpus, identity_of, spans
from graft.data.settings import Files, HuggingFace, PythonLibrary, Source
from graft.settings import Settings

MOST = 128
"""Hashes that are kept of a split: the lowest, so that two splits that share most of their files share some of them."""

MARK = 12
SHARED = 0.25
"""Of the documents of two splits so many may be the same by chance: lines such as `Yes.`"""


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
    documents: str = ""
    """Marks of documents among the split's first ones, the lowest, at most MOST: the same in a file of another kind.
    Each has MARK hexadecimal digits; they stand in order, with nothing between."""

    def meets(self, other: Content) -> bool:
        """Whether there may be a text in both. Files cut into other documents have other shares in every split."""
        apart = self.cut == other.cut and (self.high <= other.low or other.high <= self.low)
        return not apart and not set(self.files).isdisjoint(other.files)

    def repeats(self, other: Content) -> bool:
        """Whether, as far as marks tell, the two have documents in common: more than the few that any texts share."""
        both = [re.findall(f".{{{MARK}}}", content.documents) for content in (self, other)]
        full = [marks[-1] for marks in both if len(marks) == MOST]
        mine, theirs = ({mark for mark in marks if all(mark <= last for last in full)} for marks in both)
        return len(mine & theirs) > SHARED * min(len(mine), len(theirs))


def contents(corpus: AnyCorpus, split: str) -> list[Content]:
    """What `split` of a data set, or of all that it is mixed from, is read from."""
    return [content for part, _ in corpus.parts for content in _of(part, split)]


def _of(corpus: Corpus, split: str) -> Iterator[Content]:
    groups: dict[str | None, list[str]] = {}
    for place, digest in corpus.hashes:
        groups.setdefault(place, []).append(_salted(digest, corpus.settings, split))
    marks = _marks(corpus, split)
    by_hash = spans(corpus.settings, {place for place in groups if place is not None})[split]
    for place, files in groups.items():
        low, high = by_hash if place is None else (0.0, float(place == split))
        if low < high:
            yield Content(files=sorted(set(files))[:MOST], cut=_cut(corpus), low=low, high=high, documents=marks)


def _marks(corpus: Corpus, split: str) -> str:
    """Marks of the first documents in files: a second hash of each, since the first says which split it is in."""
    if not isinstance(corpus.settings, Files):
        return ""
    known = (identity_of(record).to_bytes(8, "little") for place, record in corpus.first() if place == split)
    marks = {hashlib.blake2b(identity, digest_size=MARK // 2).hexdigest() for identity in known}
    return "".join(sorted(marks)[:MOST])


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
