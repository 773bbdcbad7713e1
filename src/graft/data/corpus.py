"""A corpus: the records of a data set, cleaned of exact duplicates and split by the hash of each document."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from graft.data import heads, sources
from graft.data.settings import FIELDS, SPLITS, DataSettings, Files, HuggingFace, Mixture, Source
from graft.errors import DataError, UnknownName, closest, nearest

Record = dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """One data set, opened. Nothing is read before it is asked for."""

    name: str
    settings: Source
    root: Path

    @cached_property
    def format(self) -> str:
        """The name of the records' fields (see `FIELDS`). Raises DataError where the first record has none."""
        given = getattr(self.settings, "format", None)
        if given is not None:
            return given
        _, record = next(iter(sources.read(self.settings, self.root)), (None, None))
        if record is None:
            raise DataError(f"{self.name}: expected records, found none")
        return next(name for name, fields in FIELDS.items() if tuple(record) == fields)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the settings and of the content of every file behind them, or of the commit on the hub."""
        settings = _content_settings(self.settings)
        if isinstance(self.settings, HuggingFace):
            del settings["revision"]
            settings["commit"] = self.commit
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for split, content in self._file_hashes:
            digest.update(f"{split} {content}\n".encode())
        return digest.hexdigest()

    @property
    def hashes(self) -> list[tuple[str | None, str]]:
        """(split it is given to, sha256 of the content) of every file, or one for a commit on the hub."""
        if self.commit is None:
            return self._file_hashes
        return [(None, hashlib.sha256(f"{getattr(self.settings, 'name', '')}@{self.commit}".encode()).hexdigest())]

    @cached_property
    def _file_hashes(self) -> list[tuple[str | None, str]]:
        found = []
        for split, path in sources.content_files(self.settings, self.root):
            with open(path, "rb") as file:
                found.append((split, hashlib.file_digest(file, "sha256").hexdigest()))
        return found

    @property
    def commit(self) -> str | None:
        """The commit on the hub that is read; None for what is on this machine. Raises DataError for no such id."""
        return sources.commit(self.settings, self.root)

    @property
    def parts(self) -> list[tuple[Corpus, float]]:
        """The data sets it is mixed from, with their shares: itself alone."""
        return [(self, 1.0)]

    def records(self, split: str) -> Iterator[Record]:
        """The records of `split`, in a fixed order. Raises DataError where the split is empty."""
        if split not in SPLITS:
            raise UnknownName("split", split, SPLITS)
        empty = True
        for place, record in self._all():
            if place == split:
                empty = False
                yield record
        if empty:
            raise DataError(self._why_empty(split))

    def first(self) -> Iterator[tuple[str, Record]]:
        """(split, record) of the first records."""
        return self._placed(heads.Head(self.settings, self.root))

    def lacking(self, splits: Collection[str]) -> list[str]:
        """A sentence for each of `splits` that is empty, where the first records are all, so that it can be told."""
        head, missing = heads.Head(self.settings, self.root), set(splits)
        for place, _ in self._placed(head):
            missing.discard(place)
            if not missing:
                return []
        return [self._why_empty(s) for s in SPLITS if s in missing and (head.whole or self._has_no_file_for(s))]

    def unanswered(self, splits: Collection[str]) -> list[str]:
        """A sentence for each of `splits` whose chats have no turn of the assistant, so that nothing can be trained on;
        where the first records are all, so that it can be told."""
        if self.format != "chat":
            return []
        head, found = heads.Head(self.settings, self.root), set[str]()
        answered = set[str]()
        for place, record in self._placed(head):
            found.add(place)
            if any(message["role"] == "assistant" for message in record["messages"]):
                answered.add(place)
        mute = [split for split in SPLITS if split in splits and split in found - answered]
        return [f"{self.name}.{split}: {nothing_to_learn(self.format)}" for split in mute if head.whole]

    def describe(self) -> dict[str, Any]:
        """Format, and documents and characters of each split; reads everything once."""
        count: dict[str, dict[str, int]] = {split: {"documents": 0, "characters": 0} for split in SPLITS}
        for place, record in self._all():
            count[place]["documents"] += 1
            count[place]["characters"] += len(text_of(record))
        return {"name": self.name, "format": self.format, "fingerprint": self.fingerprint, "splits": count}

    def _all(self) -> Iterator[tuple[str, Record]]:
        """(split, record) of every record."""
        return self._placed(sources.read(self.settings, self.root))

    def _placed(self, rows: Iterable[sources.Tagged]) -> Iterator[tuple[str, Record]]:
        """(split, record) of all rows; of exact duplicates only the first is kept, whichever split it is in.

        Splits that are given come first, and no other record goes into those of them that are dev or test.
        """
        from graft.data.distinct import Distinct

        seen, place, taken = Distinct(), "train", set[str]()
        for split, record in rows:
            identity = identity_of(record)
            if split != sources.SAME:
                taken.update([split] if split else [])
                place = split or _split_of(identity, self.settings, taken)
            if seen.add(identity):
                for piece in _pieces(record, self.settings.pieces):
                    yield place, piece

    def _has_no_file_for(self, split: str) -> bool:
        return isinstance(self.settings, Files) and self.settings.path is None and not self.settings.feeds(split)

    def _why_empty(self, split: str) -> str:
        if isinstance(self.settings, Files) and self._has_no_file_for(split):
            given = ", ".join(f"`{name}`" for name in self.settings.groups())
            return (
                f"{self.name}.{split}: expected at least one document, found none: files are given for {given} alone; "
                f"name some for it (`{split}: …`), or give `path` in the place of `train`, which is split by hash"
            )
        documents = sum(1 for _ in self._all())
        without = "; with `splits: {dev: 0}` models are trained without one" if split == "dev" else ""
        hint = f"; {said}" if (said := sources.misread(self.settings, self.root)) else ""
        return (
            f"{self.name}.{split}: expected at least one document, found none: the data set has {documents} distinct "
            f"document{'s' * (documents != 1)}, split by hash; give it more documents (for text, "
            f"`document: paragraph` or `line` makes smaller ones), larger `splits`, or a file of its own "
            f"(`{split}: …`){without}{hint}"
        )


@dataclass(frozen=True)
class MixedCorpus:
    """Several data sets, drawn in proportion to their shares. Training draws tokens so; `records` goes through all."""

    name: str
    parts: list[tuple[Corpus, float]]

    @cached_property
    def format(self) -> str:
        """The format of the parts. Raises DataError where they differ."""
        formats = {part.name: part.format for part, _ in self.parts}
        if len(set(formats.values())) > 1:
            raise DataError(f"{self.name}: expected parts of one format, found {formats}")
        return next(iter(formats.values()))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the parts' fingerprints and shares."""
        return hashlib.sha256(json.dumps([[p.fingerprint, share] for p, share in self.parts]).encode()).hexdigest()

    def records(self, split: str) -> Iterator[Record]:
        """The records of every part in turn, each once."""
        for part, _ in self.parts:
            yield from part.records(split)

    def describe(self) -> dict[str, Any]:
        """The parts' descriptions and shares."""
        parts = [{**part.describe(), "share": share} for part, share in self.parts]
        return {"name": self.name, "format": self.format, "fingerprint": self.fingerprint, "parts": parts}


AnyCorpus = Corpus | MixedCorpus


def open_corpus(settings: Mapping[str, DataSettings], name: str, root: Path) -> AnyCorpus:
    """The data set `name`; relative paths start from `root`. Mixtures of mixtures multiply their shares."""
    if name not in settings:
        raise UnknownName("data set", name, settings)
    own = settings[name]
    if isinstance(own, Source):
        return Corpus(name, own, root)
    shares: dict[str, tuple[Corpus, float]] = {}
    for part, share in own.probabilities().items():
        for corpus, inner in open_corpus(settings, part, root).parts:
            before = shares.get(corpus.name, (corpus, 0.0))[1]
            shares[corpus.name] = (corpus, before + share * inner)
    return MixedCorpus(name, list(shares.values()))


def _pieces(record: Record, size: int | None) -> Iterator[Record]:
    """A text cut behind the first line end at or after every `size` characters; any other record as it is."""
    if size is None or set(record) != {"text"} or len(record["text"]) <= size:
        yield record
        return
    text, start = record["text"], 0
    while start < len(text):
        end = text.find("\n", start + size - 1) + 1 or len(text)
        yield {"text": text[start:end]}
        start = end


def nothing_to_learn(format: str) -> str:
    """What is said of data of a format that hold nothing a model is to produce."""
    wanted = "chats with a turn of the role `assistant`" if format == "chat" else "answers that are not empty"
    return f"expected {wanted}, which is what is trained on, found none"


def split_ref(reference: str) -> tuple[str, str]:
    """`mixed.dev` → `("mixed", "dev")`; without a split, train."""
    name, dot, split = reference.rpartition(".")
    return (name, split) if dot and split in SPLITS else (reference, "train")


def nearest_ref(reference: str, names: Collection[str]) -> str:
    """`" (did you mean 'code.test'?)"` where a data set of these names, or its split, is close to `reference`."""
    name, _, split = reference.rpartition(".")
    if name not in names:
        return nearest(split_ref(reference)[0], names)
    meant = closest(split, SPLITS)
    return f" (did you mean '{name}.{meant}'?)" if meant else f"; splits are {', '.join(SPLITS)}"


def has_dev(corpus: AnyCorpus) -> bool:
    """Whether all parts of a data set have a dev split, as far as their settings tell."""
    return all(part.settings.feeds("dev") for part, _ in corpus.parts)


def problems(settings: DataSettings, root: Path) -> list[str]:
    """What is wrong with a data set that can be seen before it is read whole: missing, empty, unreadable files."""
    if isinstance(settings, Mixture):
        return []
    try:
        found = sources.content_files(settings, root)
    except DataError as error:
        return [str(error)]
    empty = [path for _, path in found if path.stat().st_size == 0 and path.suffix != ".py"]
    return [f"{path}: expected data, found an empty file" for path in empty] or heads.problems(settings, root)


def text_of(record: Record) -> str:
    """All the text of a record, its fields joined by newlines: what is hashed, counted and trained tokenizers on."""
    if "messages" in record:
        return "\n".join(message["content"] for message in record["messages"])
    return "\n".join(" ".join(value) if isinstance(value, list) else str(value) for value in record.values())


def identity_of(record: Record) -> int:
    """64 bits of the sha256 of a record's fields: equal for exact duplicates."""
    plain = _canonical(record).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(plain).digest()[:8], "little")


def drawn(records: Iterable[Record], limit: int | None) -> list[Record]:
    """`limit` of the records (None: all), in their order: those with the lowest identities.

    These are a random sample, always the same one, in which neither the order of the records nor what else there is
    changes who is drawn before whom. All records are read; no more than `limit` are held.
    """
    if limit is None:
        return list(records)
    numbered = ((identity_of(record), place, record) for place, record in enumerate(records))
    kept = heapq.nsmallest(limit, numbered, key=lambda entry: entry[:2])
    return [record for _, _, record in sorted(kept, key=lambda entry: entry[1])]


def _canonical(record: Record) -> str:
    """JSON with sorted keys; the usual record, one text, is written without a search for what else may be in it."""
    if len(record) == 1:
        ((name, value),) = record.items()
        if type(value) is str:
            return f"{{{encode_basestring(name)}: {encode_basestring(value)}}}"
    return json.dumps(record, sort_keys=True, ensure_ascii=False)


def spans(settings: Source, given: Collection[str]) -> dict[str, tuple[float, float]]:
    """Split → from and below which number the hashes of its documents are, as shares of the highest hash.

    Nothing that is split by hash goes into those of dev and test that are `given`.
    """
    dev = 0.0 if "dev" in given else settings.splits.dev
    test = 0.0 if "test" in given else settings.splits.test
    return {"test": (0.0, test), "dev": (test, test + dev), "train": (test + dev, 1.0)}


def _split_of(identity: int, settings: Source, given: set[str]) -> str:
    place, found = identity / 2**64, spans(settings, given)
    if place < found["test"][1]:
        return "test"
    return "dev" if place < found["dev"][1] else "train"


def _content_settings(settings: Source) -> dict[str, Any]:
    """Settings that decide what is read; paths are left out, since the content behind them is hashed instead."""
    plain = settings.plain()
    if isinstance(settings, Files):
        for name in ("path", "train", "dev", "test"):
            plain[name] = plain[name] is not None
    return plain
