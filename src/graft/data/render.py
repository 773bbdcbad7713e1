"""From records to token ids and a loss mask: which tokens a model is trained to produce.

Plain text is trained on whole. Of a prompt with a completion only the completion is, of a chat only what the assistant
says, of labelled text the label, of a pair the target, of tagged tokens the tags, of a question on a context the
answer. A document's first token has nothing before it and is never trained on.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.data.chat import assistant_spans, chat_text
from graft.data.encode import encode, encode_with_places
from graft.data.sealed import sealed_chats
from graft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 5
"""Counted up when the same record gives other tokens, or a stream is kept in another form."""


@dataclass(frozen=True)
class Rendered:
    """One document: `ids [n]` token ids, `trained [n] bool` the tokens to be produced."""

    ids: np.ndarray
    trained: np.ndarray


def prompt_and_answer(record: dict[str, Any]) -> tuple[str, str]:
    """What is read and what is to be produced, of every format but plain text and chats."""
    if "completion" in record:
        return record["prompt"], record["completion"]
    if "target" in record:
        return record["source"] + "\n", record["target"]
    if "tags" in record:
        return " ".join(record["tokens"]) + "\n", " ".join(record["tags"])
    if "answer" in record:
        return f"{record['context']}\n{record['question']}\n", record["answer"][0]
    return record["text"] + "\n", record["label"]


def render(records: Sequence[dict[str, Any]], format: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[Rendered]:
    """The records as tokens, in one batched call of the tokenizer (which uses all cores)."""
    if format == "raw":
        raise DataError("raw records say nothing of what is to be produced: give their `format` and `fields`")
    if format == "text":
        yield from _texts(records, tokenizer)
    elif format == "chat":
        yield from _chats([record["messages"] for record in records], tokenizer)
    else:
        yield from _answers(records, tokenizer)


def _texts(records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> Iterator[Rendered]:
    texts = [record["text"] for record in records]
    start, end = ends(tokenizer)
    for ids in encode(texts, tokenizer):
        whole = _array([*start, *ids, *end])
        yield Rendered(whole, _all_but_first(len(whole)))


def _answers(records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> Iterator[Rendered]:
    pairs = [prompt_and_answer(record) for record in records]
    start, end = ends(tokenizer)
    prompts, answers = (encode(side, tokenizer) for side in zip(*pairs, strict=True))
    for head, tail in zip(prompts, answers, strict=True):
        ids = _array([*start, *head, *tail, *end])
        trained = np.arange(len(ids)) >= max(len(start) + len(head), 1)
        yield Rendered(ids, trained)


def _chats(chats: Sequence[list[dict[str, str]]], tokenizer: PreTrainedTokenizerFast) -> Iterator[Rendered]:
    texts = [chat_text(messages, tokenizer) for messages in chats]
    found = encode_with_places(sealed_chats(chats, texts, tokenizer), tokenizer)
    for messages, (ids, places) in zip(chats, found, strict=True):
        starts, ends = places.T
        trained = np.zeros(len(ids), dtype=bool)
        for first, last in assistant_spans(messages, tokenizer):
            trained |= (starts >= first) & (ends <= last) & (ends > starts)
        trained[:1] = False
        yield Rendered(ids, trained)


def ends(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids put before and behind each document."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start is None:
        start = tokenizer.cls_token_id
    if end is None:
        end = tokenizer.sep_token_id
    return ([] if start is None else [start]), ([] if end is None else [end])


def _array(ids: list[int]) -> np.ndarray:
    """[n] int64. The detour takes half of numpy's time for a list, in which no other thread can run."""
    return np.frombuffer(array("I", ids), np.uintc).astype(np.int64)


def _all_but_first(length: int) -> np.ndarray:
    trained = np.ones(length, dtype=bool)
    trained[:1] = False
    return trained
