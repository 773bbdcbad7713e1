"""The parts of two checkpoints that are compared: pieces of rows, read without the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graft.checkpoint import FLOATS, Headers, TensorHeader, TensorReader
from graft.kinship.statistics import unit

MATRICES, BLOCKS, BLOCK = 24, 8, 32
"""So many matrices are looked at, and of each so many blocks of so many rows."""
TOKENS = 2048
"""Rows of the embeddings that are looked at."""
AT_ONCE = 1 << 20
"""Numbers that are read at once where all rows are looked at."""
ASKED = 16
"""Rows of a matrix that are looked for among all rows of the other model's."""
NOT_LAYERS = re.compile(r"embed|wte|wpe|shared|lm_head|position|relative_attention|norm|ln_")
EMBEDDING = re.compile(r"(embed_tokens|wte|shared|word_embeddings|embed_in|tok_embeddings)\.weight$")
OTHER_BASIS = re.compile(r"(^|\.)(o_proj|out_proj|out_lin|attention\.output\.dense|attention\.dense|o|wo)\.weight$")
"""Matrices that read attention heads, not the hidden state, and often have as many columns."""
NUMBERS = (*FLOATS, "I8", "F8_E4M3", "F8_E5M2")
"""Stored types whose values can be compared; 8-bit integers up to the scale of their row, which is divided out."""
BY_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64, "I8": np.int8}
"""Stored types that numpy can read, and as what."""


@dataclass(frozen=True)
class Comparable:
    """Tensors that two checkpoints both have, of the same shape."""

    width: int
    """Dimensions of the hidden state."""
    layers: Sequence[str]
    """Matrices over the hidden state, inside layers."""
    embedding: str | None


def comparable(a: Headers, b: Headers) -> Comparable | None:
    """What can be compared; None where the two share no matrix of one shape."""
    shared = [n for n in sorted(a.keys() & b.keys()) if a[n].shape == b[n].shape and _is_matrix(a[n], b[n])]
    layers = [n for n in shared if not NOT_LAYERS.search(n) and not OTHER_BASIS.search(n)]
    if not layers:
        return None
    sizes: Counter[int] = Counter()
    for name in layers:
        sizes[a[name].shape[-1]] += a[name].count
    width = sizes.most_common(1)[0][0]
    embedding = next((n for n in shared if EMBEDDING.search(n) and a[n].shape[-1] == width), None)
    return Comparable(width, [n for n in layers if a[n].shape[-1] == width], embedding)


def _is_matrix(*headers: TensorHeader) -> bool:
    return all(len(h.shape) > 1 and min(h.shape) > 1 and h.dtype in NUMBERS for h in headers)


def spread(names: Sequence[str], count: int = MATRICES) -> list[str]:
    """`count` of the names, evenly."""
    return [names[i] for i in sorted({int(i) for i in np.linspace(0, len(names) - 1, min(count, len(names)))})]


def kinds(names: Sequence[str]) -> list[str]:
    """One matrix of each kind (query, up, …), of the layer in the middle."""
    of_kind: dict[str, list[str]] = {}
    for name in names:
        of_kind.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return [found[len(found) // 2] for found in of_kind.values()]


def raw_rows(reader: TensorReader, name: str, start: int, count: int) -> np.ndarray:
    """[count, d] float32: rows of a matrix (of a stack of matrices: one below the other). NaN and Inf become 0."""
    width = reader.headers[name].shape[-1]
    values = _floats(reader, name, start * width, count * width)
    return np.nan_to_num(values, posinf=0, neginf=0).reshape(count, width)


def _floats(reader: TensorReader, name: str, start: int, count: int) -> np.ndarray:
    """[count] float32: elements from `start`, without torch for the types that numpy can read."""
    stored = reader.headers[name].dtype
    if stored not in BY_NUMPY:
        return reader.read(name, start, count).float().numpy()
    raw = np.empty(count, BY_NUMPY[stored])
    reader.read_into(name, start * raw.itemsize, raw.view(np.uint8).data)
    if stored == "BF16":
        # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def rows_of(reader: TensorReader, name: str) -> int:
    """Number of rows."""
    header = reader.headers[name]
    return header.count // header.shape[-1]


def blocks(reader: TensorReader, name: str, rows: int = BLOCKS * BLOCK) -> np.ndarray:
    """[n, d] float32, as stored: at most about `rows` rows, in blocks spread over the matrix."""
    total = rows_of(reader, name)
    if total <= rows:
        return raw_rows(reader, name, 0, total)
    starts = np.linspace(0, total - BLOCK, rows // BLOCK).astype(int)
    return np.concatenate([raw_rows(reader, name, int(start), BLOCK) for start in starts])


def some_rows(reader: TensorReader, name: str, count: int = ASKED) -> np.ndarray:
    """[count, d]: single rows spread over the matrix, centred and of length 1."""
    places = np.linspace(0, rows_of(reader, name) - 1, count).astype(int)
    return unit(np.concatenate([raw_rows(reader, name, int(place), 1) for place in places]))


def all_rows(reader: TensorReader, name: str, order: np.ndarray) -> Iterator[np.ndarray]:
    """Every row in pieces [m, d], the dimensions in `order`, centred and of length 1."""
    total = rows_of(reader, name)
    piece = max(AT_ONCE // len(order), 1)
    for start in range(0, total, piece):
        yield unit(raw_rows(reader, name, start, min(piece, total - start)))[:, order]
