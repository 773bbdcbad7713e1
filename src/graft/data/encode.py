"""Text to token ids: nothing added, nothing cut off, no special tokens, on all cores, in memory that stays flat.

A long text is encoded in pieces that overlap. Where two pieces meet, both have read the same characters; the seam goes
where they agree on the tokens, so the whole is what one call would have given (where a unigram tokenizer finds two
readings of a text exactly as likely, such as of a long run of one letter, it may be the other).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graft.data.sealed import sealed

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PIECE = 1 << 16
"""Characters of a piece. A longer text is encoded in several."""
OVERLAP = 1 << 10
"""Characters that a piece reads of the one before it."""
AGREED = 8
"""Tokens on either side of a seam in which both pieces must agree."""
AT_ONCE = 16
"""Pieces in one call: a tokenizer takes about 200 bytes a token until its result is read."""


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of each text; none of them is a special token, whatever a text says."""
    backend = sealed(tokenizer).backend
    short = backend.encode_batch_fast([t for t in texts if len(t) <= PIECE], add_special_tokens=False)
    made = iter(short)
    return [next(made).ids if len(text) <= PIECE else _encode_long(text, backend) for text in texts]


def encode_with_places(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids [n] of each text and the characters [n, 2] each token stands for, spaces included.

    Special tokens are those of `sealed_chats`, none otherwise.
    """
    backend = sealed(tokenizer).backend
    for encoded in backend.encode_batch(list(texts), add_special_tokens=False):
        yield np.array(encoded.ids, np.int64), np.array(encoded.offsets, np.int64).reshape(-1, 2)


def uncut(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer itself, without the truncation and padding that it was saved with or last called with."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is None and backend.padding is None:
        return backend
    backend = type(backend).from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


@dataclass(frozen=True)
class _Piece:
    """Tokens of a part of a text: `ids [n]` and the characters `places [n, 2]` they stand for, counted in the text."""

    ids: np.ndarray
    places: np.ndarray

    def around(self, token: int) -> np.ndarray:
        """What stands around a token [2 * AGREED, 3]: ids and places."""
        here = slice(max(0, token - AGREED), token + AGREED)
        return np.column_stack([self.ids[here], self.places[here]])


def _encode_long(text: str, backend: Tokenizer) -> list[int]:
    """The ids of a text in pieces, or in one where two pieces do not come to agree (a letter repeated endlessly)."""
    held: _Piece | None = None
    ids: list[np.ndarray] = []
    for start, piece in _pieces(text, backend):
        if held is not None:
            seam = _seam(held, piece, start - OVERLAP // 2)
            if seam is None:
                return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            ids.append(held.ids[: seam[0]])
            piece = _Piece(piece.ids[seam[1] :], piece.places[seam[1] :])
        held = piece
    assert held is not None
    return np.concatenate([*ids, held.ids]).tolist()


def _pieces(text: str, backend: Tokenizer) -> Iterator[tuple[int, _Piece]]:
    """(first character that is not overlap, tokens) of every piece."""
    starts = range(0, len(text), PIECE)
    for first in range(0, len(starts), AT_ONCE):
        group = starts[first : first + AT_ONCE]
        begins = [max(0, start - OVERLAP) for start in group]
        parts = [text[begin : start + PIECE] for begin, start in zip(begins, group, strict=True)]
        encoded = backend.encode_batch(parts, add_special_tokens=False)
        for start, begin, made in zip(group, begins, encoded, strict=True):
            places = np.array(made.offsets, np.int64).reshape(-1, 2) + begin
            yield start, _Piece(np.array(made.ids, np.int64), places)


def _seam(left: _Piece, right: _Piece, middle: int) -> tuple[int, int] | None:
    """(token of `left`, token of `right`) that both begin at or behind the character `middle`, if they agree there."""
    first, second = (int(np.searchsorted(piece.places[:, 0], middle)) for piece in (left, right))
    if np.array_equal(left.around(first), right.around(second)):
        return first, second
    return None
