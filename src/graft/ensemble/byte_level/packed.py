"""Attention of many token trees whose new tokens stand side by side in one row, so that nothing is padded.

A model reads such a row as one text; only its attention, which it takes from the interface of `transformers`, is this
one for as long as the row is read: the tokens of a tree see columns of that tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from graft.ensemble.byte_level.columns import Columns

IMPLEMENTATION = "graft_trees"
OTHERS = ("softcap", "s_aux", "position_bias")
"""What a model may give its attention that this one does not know."""


class Piece(NamedTuple):
    """The tokens `begin … end` of a row are of one tree: its first columns are seen as `mask [end - begin, width]`
    says, which is added to the attention's logits."""

    begin: int
    end: int
    tree: int
    mask: torch.Tensor


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
    keys, values = key.keys, value.values
    assert keys is not None
    assert values is not None
    shared = query.shape[1] // keys.shape[2]
    made = query.new_empty(1, query.shape[2], query.shape[1], values.shape[3])
    for begin, end, tree, mask in key.places.pieces:
        k, v = (kept[tree, : mask.shape[1]].transpose(0, 1) for kept in (keys, values))
        if shared > 1:
            k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        seen = scaled_dot_product_attention(
            query[:, :, begin:end], k[None], v[None], attn_mask=mask[None, None], dropout_p=dropout, scale=scaling
        )
        made[:, begin:end] = seen.transpose(1, 2)
    return made, None


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
