"""Vocabularies brought together by token string: which row of each parent goes where, and the tokenizer that fits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.checkpoint import Headers, TensorReader
from graft.errors import CannotCombine
from graft.folders import read_json
from graft.merge.adapted import Virtual
from graft.vocabulary import token_ids

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from graft.merge.inputs import Input
    from graft.merge.settings import MergeSettings

LACKS = -1
Places = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Vocabulary:
    """The output's vocabulary and where its rows come from."""

    rows: Mapping[str, np.ndarray]
    """Parent → [rows of the output] int64: the parent's row for it, −1 where it has none."""
    tensors: frozenset[str]
    """Tensors of the output whose rows stand for tokens."""
    base: str | None
    """Whose rows stand in for those that others lack, where the method has a base."""
    tokenizer: dict[str, Any] | None
    """The content of `tokenizer.json`; None: that of the first parent."""
    notes: Mapping[str, Any]
    special: tuple[str, ...] = ()
    """Special tokens beside those with a role, that other parents' `tokenizer_config.json` names."""

    @property
    def size(self) -> int:
        """Rows of the output."""
        return len(next(iter(self.rows.values())))

    def headers(self, name: str, own: Headers, places: Places) -> Headers:
        """The headers of a parent whose token rows stand as in the output."""
        made = dict(own)
        for tensor in self.tensors & places.keys():
            if name in places[tensor]:
                made[places[tensor][name]] = _resized(own[places[tensor][name]], self.size)
        return made


def _resized(header: Any, size: int) -> Virtual:
    axis = next(i for i, n in enumerate(header.shape) if n > 1)
    shape = (*header.shape[:axis], size, *header.shape[axis + 1 :])
    return Virtual(header.name, "F32", shape, header.file, header.start, header.end, header.stored)


def joined(
    settings: MergeSettings, parts: Mapping[str, Input], headers: Mapping[str, Headers], places: Places
) -> Vocabulary:
    """What `vocabulary: union | base` makes of the parents.

    Raises CannotCombine for a parent without `tokenizer.json` and for an architecture that this `transformers` does
    not know.
    """
    from graft.merge.architecture import token_tensors

    reference = settings.parents[0]
    tokens = {name: _tokens(name, part.tokenizer) for name, part in parts.items()}
    found = token_tensors(parts[reference].home)
    shapes = {
        tensor: headers[reference][place[reference]].shape for tensor, place in places.items() if reference in place
    }
    tensors = frozenset(tensor for tensor, shape in shapes.items() if _is_one(tensor, shape, found))
    if not tensors:
        raise CannotCombine(f"{reference}: expected tensors with a row for each token, found none that is known")
    held = {name: _held(name, tensors, headers, places) for name in parts}
    order = _order(settings, tokens, held[reference])
    rows = {name: _rows(tokens[name], held[name], order) for name in parts}
    # rows behind the last token are padding of the first parent, and stay
    padding = np.array([token is None for token in order])
    rows[reference][padding] = np.flatnonzero(padding)
    new = [token for token in order if token is not None and token not in tokens[reference]]
    made = None
    if settings.vocabulary == "union" and new:
        raw = {name: json.loads((part.tokenizer / "tokenizer.json").read_text()) for name, part in parts.items()}
        made = union_tokenizer(raw, reference, [t or "" for t in order], new)
    special = _special(made, [part.tokenizer for name, part in parts.items() if name != reference]) if made else ()
    notes = {
        "how": settings.vocabulary,
        "rows": len(order),
        "new_tokens": len(new),
        "lacking": {name: int((own == LACKS).sum()) for name, own in rows.items()},
    }
    return Vocabulary(rows, tensors, settings.base_name, made, notes, special)


EXTRA = ("extra_special_tokens", "additional_special_tokens")
"""What `tokenizer_config.json` calls special tokens beside those with a role, now and before transformers 5."""


def _special(made: Mapping[str, Any], homes: Sequence[Path]) -> tuple[str, ...]:
    """Those that the settings in these folders name and that are special in the tokenizer that is made too."""
    special = {entry["content"] for entry in made["added_tokens"] if entry.get("special")}
    return tuple(dict.fromkeys(token for home in homes for token in _extra(home) if token in special))


def _extra(home: Path) -> list[str]:
    path = home / "tokenizer_config.json"
    said = read_json(path, "tokenizer's settings") if path.is_file() else {}
    found = [said.get(name) or () for name in EXTRA]
    # by a name of their own (`image_token`) in some, each as text or with how it is found in text
    listed = [token for each in found for token in (each.values() if isinstance(each, dict) else each)]
    return [token["content"] if isinstance(token, dict) else token for token in listed]


def with_special(said: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """Settings of a tokenizer with more special tokens, where it lists its own already or as transformers does now."""
    key = next((name for name in EXTRA if isinstance(said.get(name), list) and said[name]), None)
    key = key or next(name for name in EXTRA if not isinstance(said.get(name), dict))
    own = list(said.get(key) or ())
    there = {token["content"] if isinstance(token, dict) else token for token in own}
    return {**said, key: [*own, *(token for token in tokens if token not in there)]}


def _tokens(name: str, home: Path) -> Mapping[str, int]:
    found = token_ids(home)
    if found is None:
        raise CannotCombine(f"{name}: its tokens are not known without tokenizer.json, which {home} does not have")
    return found


def _is_one(tensor: str, shape: tuple[int, ...], found: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a checkpoint's tensor is one of the model's that are given; its name may begin otherwise there."""
    return any(_end(tensor) == _end(name) and shape == other for name, other in found.items())


def _end(name: str) -> list[str]:
    return name.split(".")[-2:]


def _held(name: str, tensors: frozenset[str], headers: Mapping[str, Headers], places: Places) -> int:
    """Rows that a parent has."""
    shapes = [headers[name][places[t][name]].shape for t in tensors if name in places[t]]
    return min((next(n for n in shape if n > 1) for shape in shapes), default=0)


def _order(settings: MergeSettings, tokens: Mapping[str, Mapping[str, int]], held: int) -> list[str | None]:
    """The token of every row of the output: those of the first parent stay where they are, new ones come after."""
    reference = tokens[settings.parents[0]]
    last = max(reference.values(), default=-1)
    order: list[str | None] = [None] * (max(held, last + 1) if settings.vocabulary == "union" else held)
    for token, place in reference.items():
        if place < len(order):
            order[place] = token
    if settings.vocabulary == "base":
        return order
    known = set(reference)
    place = last + 1
    for name in settings.parents[1:]:
        for token in sorted(tokens[name], key=tokens[name].__getitem__):
            if token not in known:
                known.add(token)
                order[place : place + 1] = [token]
                place += 1
    return order


def _rows(tokens: Mapping[str, int], held: int, order: Sequence[str | None]) -> np.ndarray:
    places = [tokens.get(token, LACKS) if token is not None else LACKS for token in order]
    return np.array([place if place < held else LACKS for place in places], dtype=np.int64)


class AlignedReader(TensorReader):
    """A parent whose token rows stand in the order of the output; those it lacks are made of the others'.

    They are the base's where there is a base that has them, else the mean of those that have them: a model that lacks a
    token says nothing about it.
    """

    def __init__(self, name: str, readers: Mapping[str, TensorReader], vocabulary: Vocabulary, places: Places):
        self.name, self.readers, self.vocabulary = name, readers, vocabulary
        self.inner = readers[name]
        self.folder = self.inner.folder
        self.headers = vocabulary.headers(name, self.inner.headers, places)
        self._places = {
            place[name]: place for tensor, place in places.items() if tensor in vocabulary.tensors and name in place
        }

    @property
    def base(self) -> TensorReader | None:
        """The reader of the model that an adapter stands on."""
        return getattr(self.inner, "base", None)

    def change(self, name: str, start: int, count: int) -> Tensor | None:
        """What an adapter adds to a tensor whose rows stay where they are."""
        return None if name in self._places else self.inner.change(name, start, count)  # type: ignore[attr-defined]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of the tensor from byte `start`; float32 where the rows stand for tokens."""
        import torch

        if name not in self._places:
            self.inner.read_into(name, start, buffer)
            return
        width = self.headers[name].count // self.vocabulary.size
        first, count = start // 4, len(buffer) // 4
        top, bottom = first // width, -(-(first + count) // width)
        rows = self._block(self._places[name], top, bottom, width)
        torch.frombuffer(buffer, dtype=torch.float32, count=count).copy_(rows.view(-1)[first - top * width :][:count])

    def _block(self, place: Mapping[str, str], top: int, bottom: int, width: int) -> Tensor:
        """[rows, width] float32: rows `top` to `bottom` of the output, as this parent has them."""
        own = self.vocabulary.rows[self.name][top:bottom]
        made = _gathered(self.inner, place[self.name], own, width)
        lacking = np.flatnonzero(own == LACKS)
        if len(lacking):
            made[lacking] = self._standing_in(place, top + lacking, width)
        return made

    def _standing_in(self, place: Mapping[str, str], rows: np.ndarray, width: int) -> Tensor:
        import torch

        have = {name: self.vocabulary.rows[name][rows] for name in place}
        whole, number = torch.zeros(len(rows), width), torch.zeros(len(rows), 1)
        for name, own in have.items():
            whole += _gathered(self.readers[name], place[name], own, width)
            number += torch.from_numpy((own != LACKS).astype(np.float32))[:, None]
        mean = whole / number.clamp(min=1)
        base = self.vocabulary.base
        if base is None or base not in have:
            return mean
        told = torch.from_numpy(have[base] != LACKS)[:, None]
        return torch.where(told, _gathered(self.readers[base], place[base], have[base], width), mean)

    def origin(self, name: str) -> Path:
        """The file to look at where the tensor's values are no numbers."""
        return self.inner.origin(name)

    def close(self) -> None:
        """The files belong to the parent's own reader."""


def _gathered(reader: TensorReader, name: str, rows: np.ndarray, width: int) -> torch.Tensor:
    """[len(rows), width] float32: some rows of a tensor, zero for −1; neighbours are read together."""
    import torch

    made = torch.zeros(len(rows), width)
    ends = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] == LACKS)) + 1
    for start, stop in zip([0, *ends], [*ends, len(rows)], strict=True):
        if stop > start and rows[start] != LACKS:
            found = reader.read(name, int(rows[start]) * width, int(stop - start) * width)
            made[start:stop] = found.float().view(-1, width)
    return made


def aligned(
    readers: Mapping[str, TensorReader], vocabulary: Vocabulary | None, places: Places
) -> Mapping[str, TensorReader]:
    """The readers, with token rows in the order of the output."""
    if vocabulary is None:
        return readers
    return {name: AlignedReader(name, readers, vocabulary, places) for name in readers}


def with_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A configuration for so many rows, also where it stands inside another."""
    made = {k: with_size(v, size) if k == "text_config" and isinstance(v, Mapping) else v for k, v in config.items()}
    return made | {"vocab_size": size} if "vocab_size" in config else made


def union_tokenizer(
    raw: Mapping[str, dict[str, Any]], reference: str, order: Sequence[str], new: Sequence[str]
) -> dict[str, Any]:
    """`tokenizer.json` of the reference with the tokens of the others behind its own.

    Where all are of one kind (BPE, WordPiece, …) the new tokens are found in text as the others find them, new merges
    after the reference's own; else they are matched as they are spelt.
    """
    made = json.loads(json.dumps(raw[reference]))
    places = {token: place for place, token in enumerate(order) if token}
    kinds = {one["model"].get("type") for one in raw.values()}
    known = {entry["content"] for entry in made.get("added_tokens", [])}
    added = {e["content"]: e for one in raw.values() for e in one.get("added_tokens", []) if e["content"] not in known}
    if len(kinds) == 1:
        _grow(made["model"], raw, order, places)
    else:
        added |= {token: _as_spelt(token) for token in new if token not in added}
    made["added_tokens"] = sorted(
        [*made.get("added_tokens", []), *({**added[t], "id": places[t]} for t in new if t in added)],
        key=lambda entry: entry["id"],
    )
    return made


def _as_spelt(token: str) -> dict[str, Any]:
    return {
        "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False
    }  # fmt: skip


def _grow(
    model: dict[str, Any], raw: Mapping[str, dict[str, Any]], order: Sequence[str], places: Mapping[str, int]
) -> None:
    """Put all tokens into the model of a tokenizer, at their places."""
    if isinstance(model.get("vocab"), list):
        scores = {token: score for one in reversed(list(raw.values())) for token, score in one["model"]["vocab"]}
        lowest = min(scores.values(), default=0.0)
        model["vocab"] = [[token or f"<unused{place}>", scores.get(token, lowest)] for place, token in enumerate(order)]
        return
    # special tokens as well: a place is then theirs whatever else comes into the vocabulary
    model["vocab"] = dict(sorted(places.items(), key=lambda item: item[1]))
    if "merges" in model:
        pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        have = set(pairs)
        for one in raw.values():
            for merge in one["model"].get("merges", []):
                pair = tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
                if pair not in have:
                    have.add(pair)
                    pairs.append(pair)
        model["merges"] = [list(pair) for pair in pairs]
