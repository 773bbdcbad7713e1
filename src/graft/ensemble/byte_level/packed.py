"""Attention of many token trees whose new tokens stand side by side in one row, so that nothing is padded.

A model reads such a row as one text; only its attention, which it takes from the interface of `transformers`, is this
one for as long as the row is read: the tokens of a tree see columns of that tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from graft.ensemble.byte_level.columns import Columns

IMPLEMENTATION = "graft_trees"
OTHERS = ("softcap", "s_aux", "position_bias")
"""What a model may give its attention that this one does not know."""


PADDED, FEW = 1.2, 64
"""Trees are attended to together, padded to the one with most tokens and the one with most columns, where that makes of
what a token may see this much at most, or where all of them have so few tokens."""


class Piece(NamedTuple):
    """The tokens `begin … end` of a row are of one tree: `seen [end - begin, width] bool` are its first columns."""

    begin: int
    end: int
    tree: int
    seen: np.ndarray


class Block(NamedTuple):
    """Trees that are attended to together, and what is added to the attention's logits of their tokens, of each tree
    as many as of the longest, `mask [trees, 1, longest, width]`."""

    trees: slice
    mask: torch.Tensor


class Blocks(NamedTuple):
    """All tokens of a pass: `tokens [padded]` are those of all blocks, one behind the other (any, where a tree has
    fewer), `rows [tokens]` is where each is among these (both None: they stand so)."""

    blocks: list[Block]
    tokens: torch.Tensor | None
    rows: torch.Tensor | None


def blocks_of(pieces: Sequence[Piece], dtype: torch.dtype, device: torch.device) -> Blocks:
    """The pieces of a pass, neighbouring trees together unless most of what is then read were padding."""
    blocks, taken, before = [], [], 0
    rows = np.empty(sum(piece.end - piece.begin for piece in pieces), np.int64)
    for own in _together(pieces):
        trees = slice(own[0].tree, own[-1].tree + 1)
        tokens = np.zeros((trees.stop - trees.start, max(piece.end - piece.begin for piece in own)), np.int64)
        seen = np.zeros((*tokens.shape, max(piece.seen.shape[1] for piece in own)), bool)
        seen[:, :, 0] = True  # padding sees the start
        for begin, end, tree, columns in own:
            row, size = tree - trees.start, end - begin
            tokens[row, :size] = np.arange(begin, end)
            seen[row, :size, : columns.shape[1]] = columns
            rows[begin:end] = np.arange(size) + (before + row * tokens.shape[1])
        before += tokens.size
        taken.append(tokens.ravel())
        blocks.append(Block(trees, _mask(seen, dtype, device)))
    if before == len(rows) and bool((rows == np.arange(before)).all()):
        return Blocks(blocks, None, None)
    return Blocks(blocks, *(torch.from_numpy(each).to(device) for each in (np.concatenate(taken), rows)))


def _mask(seen: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zero where `seen [trees, tokens, width] bool`, else the least number: `[trees, 1, tokens, width]`."""
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(torch.from_numpy(~seen), torch.finfo(dtype).min)
    return mask[:, None].to(device)


def _together(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Runs of pieces in the order of their trees, each as long as padding lets it be."""
    runs: list[list[Piece]] = []
    longest = widest = shown = 0
    for piece in sorted(pieces, key=lambda piece: piece.tree):
        size, width = piece.seen.shape
        longest, widest, shown = max(longest, size), max(widest, width), shown + size * width
        trees = piece.tree + 1 - runs[-1][0].tree if runs else 0
        if not runs or (trees * longest > FEW and trees * longest * widest > PADDED * shown):
            runs.append([])
            longest, widest, shown = size, width, size * width
        runs[-1].append(piece)
    return runs


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Columns,
    value: Columns,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **how: Any,
) -> tuple[torch.Tensor, None]:
    """Of queries `[1, heads, tokens, channels]` the values they see, `[1, tokens, heads, channels]`.

    Raises ValueError for a model whose attention is more than scaled dot products.
    """
    if found := [name for name in OTHERS if how.get(name) is not None]:
        raise ValueError(f"expected attention of scaled dot products alone, found {', '.join(found)}")
    keys, values, places = key.keys, value.values, key.places
    assert keys is not None
    assert values is not None
    assert places.packed is not None
    packed, parts, before = places.packed, [], 0
    shared, queries = query.shape[1] // keys.shape[1], query[0].transpose(0, 1)
    if packed.tokens is not None:
        queries = queries.index_select(0, packed.tokens)
    for trees, mask in packed.blocks:
        count, _, longest, width = mask.shape
        k, v = (kept[trees, :, :width] for kept in (keys, values))
        if shared > 1:
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        own = queries[before : before + count * longest].unflatten(0, (count, longest)).transpose(1, 2)
        before += count * longest
        seen = scaled_dot_product_attention(own, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        parts.append(seen.transpose(1, 2).flatten(0, 1))
    made = torch.cat(parts)
    return (made if packed.rows is None else made.index_select(0, packed.rows))[None], None


AttentionInterface.register(IMPLEMENTATION, attention)


@contextmanager
def packing(model: Any) -> Iterator[None]:
    """While this lasts, a model's attention is that of trees. Raises ValueError where it was not the plain one."""
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"expected attention sdpa, found {model.config._attn_implementation}")
    model.config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        model.config._attn_implementation = "sdpa"
