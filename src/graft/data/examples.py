"""Examples for heads: a class for a text, a tag for each word, the place of an answer in a context.

Rows hold `input_ids [n]` and
  classification  `labels []`: the class
  tagging         `labels [n]`: the tag at the first token of each word, -100 elsewhere
  spans           `labels [2]`: first and last token of the answer; 0, 0 (the first token) where it is not in the row
All int64; a label that is not known is -100.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.data.alone import IGNORED, padded
from graft.data.encode import encode, encode_with_places
from graft.data.render import ends
from graft.data.rows import Row
from graft.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

Record = dict[str, Any]


def labels_in(head: str, records: Iterable[Record]) -> list[str]:
    """The labels (of a classification) or tags that occur, sorted; none for spans."""
    if head == "classification":
        return sorted({record["label"] for record in records})
    if head == "tagging":
        return sorted({tag for record in records for tag in record["tags"]})
    return []


@dataclass(frozen=True)
class Window:
    """A row of a question: `row`, where its context's tokens begin, and the characters of each of them, [tokens, 2]."""

    row: Row
    first: int
    places: np.ndarray


class Encoder:
    """Records as rows of at most `length` tokens, for a head with these labels.

    What is longer loses its end; a context is read in windows that overlap by half.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int, labels: Sequence[str] = ()):
        self.tokenizer, self.length = tokenizer, length
        self.number = {label: number for number, label in enumerate(labels)}
        self.start, self.end = ends(tokenizer)

    def rows(self, head: str, records: Sequence[Record]) -> list[Row]:
        """All rows of the records."""
        if head == "classification":
            return self.classified(records)
        if head == "tagging":
            return [row for row, _ in self.tagged(records)]
        return [window.row for record in records for window in self.windows(record)]

    def classified(self, records: Sequence[Record]) -> list[Row]:
        """A row for each record."""
        texts = encode([record["text"] for record in records], self.tokenizer)
        return [
            {"input_ids": self._framed(ids), "labels": np.array(self.number.get(record["label"], IGNORED))}
            for record, ids in zip(records, texts, strict=True)
        ]

    def tagged(self, records: Sequence[Record]) -> list[tuple[Row, np.ndarray]]:
        """(row, [words] the token at which each word is tagged; -1 where it is cut off) for each record."""
        made = []
        texts = [" ".join(record["tokens"]) for record in records]
        for record, (ids, places) in zip(records, encode_with_places(texts, self.tokenizer), strict=True):
            framed = self._framed(ids)
            lengths = [len(word) + 1 for word in record["tokens"]]
            begins = np.cumsum([0, *lengths[:-1]])
            tokens = np.searchsorted(places[:, 1], begins, side="right") + len(self.start)
            tokens = np.where(tokens < len(framed) - len(self.end), tokens, -1)
            labels = np.full(len(framed), IGNORED, np.int64)
            tags = np.array([self.number.get(tag, IGNORED) for tag in record["tags"]])
            there = tokens >= 0
            labels[tokens[there][::-1]] = tags[there][::-1]  # of words in one token the first is learned
            made.append(({"input_ids": framed, "labels": labels}, tokens))
        return made

    def windows(self, record: Record) -> list[Window]:
        """The rows of a question on a context. Raises DataError where the question leaves no room for a context."""
        (question,) = encode([record["question"] + "\n"], self.tokenizer)
        ((ids, places),) = encode_with_places([record["context"]], self.tokenizer)
        head = [*self.start, *question]
        room = self.length - len(head) - len(self.end)
        if room < 2:
            raise DataError(
                f"expected questions that leave room for a context within {self.length} tokens, found one of "
                f"{len(question)}; raise `length`"
            )
        wanted = self._answer(record, places)
        made = []
        for begin in range(0, max(len(ids) - room, 0) + max(room // 2, 1), max(room // 2, 1)):
            here = slice(begin, begin + room)
            row = np.array([*head, *ids[here], *self.end], np.int64)
            inside = wanted is not None and begin <= wanted[0] and wanted[1] < min(begin + room, len(ids))
            labels = np.array(wanted) - begin + len(head) if inside else np.zeros(2, np.int64)
            made.append(Window({"input_ids": row, "labels": labels}, len(head), places[here]))
            if begin + room >= len(ids):
                break
        return made

    @staticmethod
    def _answer(record: Record, places: np.ndarray) -> tuple[int, int] | None:
        """First and last token of the first place where an acceptable answer stands in the context."""
        for answer in record["answer"]:
            begin = record["context"].find(answer)
            if begin >= 0:
                first = int(np.searchsorted(places[:, 1], begin, side="right"))
                last = int(np.searchsorted(places[:, 0], begin + len(answer), side="left")) - 1
                return (first, last) if first <= last else None
        return None

    def _framed(self, ids: Iterable[int]) -> np.ndarray:
        """With the tokens that begin and end a document, cut to the length."""
        room = self.length - len(self.start) - len(self.end)
        return np.array([*self.start, *list(ids)[:room], *self.end], np.int64)


class LabelledCollate:
    """Rows as one batch: `input_ids`, `attention_mask` [rows, longest], `labels` [rows] or [rows, longest or 2]."""

    def __init__(self, head: str, pad: int):
        self.head, self.pad = head, pad

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        import torch

        labels = [row["labels"] for row in rows]
        made = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad),
            "attention_mask": padded([np.ones(len(row["input_ids"]), np.int64) for row in rows], 0),
            "labels": padded(labels, IGNORED) if self.head == "tagging" else np.stack(labels).astype(np.int64),
        }
        return {name: torch.from_numpy(array) for name, array in made.items()}
