"""Token streams: a split of a corpus as token ids on disk, made once and memory-mapped, so that memory stays flat.

A stream's folder holds `ids.bin` (uint16 or uint32), `trained.bin` (uint8; absent where all but first tokens are
trained on), `offsets.bin` (int64 [documents + 1]) and `stream.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from graft.data import render
from graft.data.amount import text_bytes
from graft.data.corpus import Corpus, text_of
from graft.data.encode import uncut
from graft.disk import atomic_folder
from graft.errors import DataError
from graft.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
R = TypeVar("R")
Batch = tuple[np.ndarray, np.ndarray | None, np.ndarray]
"""Of some documents: `ids [tokens]`, `trained [tokens]` (None: all but firsts), `lengths [documents]`."""

BATCH_CHARACTERS = 1 << 20
"""Text that is tokenised in one call: enough for all cores, little enough to hold."""
AHEAD = 2
"""Batches that are being tokenised while another is written and the next is read."""


@dataclass(frozen=True)
class TokenStream:
    """`ids [tokens]`, `offsets [documents + 1]`, and `trained [tokens]` (None: all but firsts)."""

    ids: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray | None

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and trained mask of one document."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.ids[start:end], self.trained_between(start, end, start)

    def trained_between(self, start: int, end: int, document_start: int) -> np.ndarray:
        """The trained mask [end - start] of tokens inside one document that starts at `document_start`."""
        if self.trained is not None:
            return self.trained[start:end].astype(bool)
        mask = np.ones(end - start, dtype=bool)
        if start == document_start:
            mask[:1] = False
        return mask


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of all that decides the tokens of a record."""
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]
    plain = uncut(tokenizer).to_str() + json.dumps([ends, tokenizer.chat_template])
    return hashlib.sha256(plain.encode()).hexdigest()


def stream_name(corpus: Corpus, split: str, tokenizer: PreTrainedTokenizerFast) -> list[str | int]:
    """All that decides what a stream holds."""
    return [corpus.fingerprint, split, tokenizer_hash(tokenizer), render.VERSION]


def tokenize(corpus: Corpus, split: str, tokenizer: PreTrainedTokenizerFast, cache: Path) -> TokenStream:
    """The token stream of one split, from `cache` where it has been made before.

    Two processes that make it at once both succeed; one result is kept. Raises DataError for an empty split.
    """
    name = stream_name(corpus, split, tokenizer)
    folder = cache / "streams" / hashlib.sha256(json.dumps(name).encode()).hexdigest()[:32]
    if not (folder / "stream.json").exists():
        with atomic_folder(folder, keep_existing=True) as part:
            _write(corpus, split, tokenizer, part)
    return open_stream(folder)


def open_stream(folder: Path) -> TokenStream:
    """A stream that was made before, memory-mapped."""
    facts = json.loads((folder / "stream.json").read_text())
    trained = folder / "trained.bin"
    return TokenStream(
        _mapped(folder / "ids.bin", facts["dtype"]),
        _mapped(folder / "offsets.bin", "int64"),
        _mapped(trained, "uint8") if trained.exists() else None,
    )


def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r")


def _write(corpus: Corpus, split: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    plain = corpus.format == "text"

    def batches() -> Iterator[Batch]:
        rendered = _ahead(
            lambda batch: (list(render.render(batch[0], corpus.format, tokenizer)), batch[1]),
            _batches(corpus.records(split)),
        )
        with Progress(f"tokenising {corpus.name}.{split}", text_bytes(corpus, split), "bytes") as progress:
            for done, characters in rendered:
                ids = np.concatenate([r.ids for r in done])
                progress.advance(characters)
                trained = None if plain else np.concatenate([r.trained for r in done])
                yield ids, trained, np.array([len(r.ids) for r in done])

    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    if write_stream(folder, dtype, batches(), masked=not plain) == 0:
        raise DataError(f"{corpus.name}.{split}: expected text, found only empty documents")


def write_stream(folder: Path, dtype: str, batches: Iterable[Batch], *, masked: bool) -> int:
    """Write a stream, some documents at a time, and return its number of tokens; `masked`: they come with a mask."""
    total = 0
    with (
        open(folder / "ids.bin", "wb") as to_ids,
        open(folder / "trained.bin", "wb") if masked else nullcontext() as to_trained,
        open(folder / "offsets.bin", "wb") as to_offsets,
    ):
        # not by numpy's `tofile`: where a disk is full, that does not say so
        to_offsets.write(np.zeros(1, np.int64).data)
        for ids, trained, lengths in batches:
            to_ids.write(ids.astype(dtype).data)
            if to_trained is not None and trained is not None:
                to_trained.write(trained.astype(np.uint8).data)
            to_offsets.write((total + np.cumsum(lengths, dtype=np.int64)).data)
            total += int(lengths.sum())
    (folder / "stream.json").write_text(json.dumps({"dtype": dtype, "tokens": total}))
    return total


def _ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results of `work` in order, while threads work on up to AHEAD further items."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(records: Iterator[dict[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Records in groups of about BATCH_CHARACTERS, with how many characters they have."""
    batch: list[dict[str, Any]] = []
    held = 0
    for record in records:
        batch.append(record)
        held += len(text_of(record))
        if held >= BATCH_CHARACTERS:
            yield batch, held
            batch, held = [], 0
    if batch:
        yield batch, held
