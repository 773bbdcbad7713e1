"""Moments of 8 bits that processes hold in parts, as numbers and their scales: any other placement reads them again.

A code stands for a number of a table times the scale of its block of 256 (Dettmers et al. 2022, arXiv:2110.02861,
section 2). Parts are cut elsewhere than blocks, and a small part is held in 32 bits where the whole is not, so codes of
parts do not make a whole. Numbers do; beside each stands its scale, from which the same codes come again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

BLOCK = 256
SCALES = {"state1": "absmax1", "state2": "absmax2"}
"""A moment's name in the state of bitsandbytes → that of its scales."""
TABLES = {"state1": "qmap1", "state2": "qmap2"}
"""… → that of the numbers that its codes stand for."""
NAMES = (*SCALES, *SCALES.values(), *TABLES.values())


def each(scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The scale of every number of `like`, in its shape, from those `[blocks]`."""
    return scales.repeat_interleave(BLOCK)[: like.numel()].view(like.shape)


def numbers(codes: torch.Tensor, scale_each: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """float32 `[…]` that codes `[…] uint8` stand for, with the scale of each and the `table [256]` of numbers."""
    return table[codes.long()] * scale_each


def coded(values: torch.Tensor, scale_each: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes `[…] uint8`, scales `[blocks]`) nearest to `values […]`.

    A block whose numbers had one scale keeps it, and so its codes; one that is cut in another way than before takes its
    largest number. `table` rises.
    """
    blocks, scales = _blocks(values), _blocks(scale_each)
    low, high = scales.amin(1), scales.amax(1)
    own = torch.where((low == high) & (low > 0), low, blocks.abs().amax(1))
    found = torch.bucketize((blocks / own[:, None]).nan_to_num(0.0), (table[1:] + table[:-1]) / 2)
    return found.to(torch.uint8).flatten()[: values.numel()].view(values.shape), own


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """`[blocks, 256]`, the last one filled with its last number."""
    flat = values.flatten()
    return functional.pad(flat[None], (0, -len(flat) % BLOCK), mode="replicate").view(-1, BLOCK)


def spread(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of one parameter (codes or 32 bits) as numbers, with the scale of each; zero where there is none."""
    found = {name: value for name, value in state.items() if name not in NAMES}
    for name, scale in ((name, scale) for name, scale in SCALES.items() if name in state):
        held = state[name]
        packed = held.dtype == torch.uint8
        scales = each(state[scale], held) if packed else torch.zeros_like(held)
        found |= {name: numbers(held, scales, state[TABLES[name]]) if packed else held, scale: scales}
    return found


@torch.no_grad()
def put(state: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    """Fill the moments of `state` (codes or 32 bits) in place with what `spread` gave, or with codes."""
    for name, scale in SCALES.items():
        if name not in state:
            continue
        target, value = state[name], held[name].to(state[name].device)
        scales = held[scale].to(target.device) if scale in held else torch.zeros_like(value)
        if target.dtype == value.dtype and (scale not in state or scales.shape == state[scale].shape):
            own = scales
        else:
            value, own = _in_form(state, name, value, scales)
        target.copy_(value)
        if scale in state:
            state[scale].copy_(own)


def _in_form(
    state: Mapping[str, torch.Tensor], name: str, value: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A moment, codes or numbers, as `state` holds it; and its scales."""
    table = _table(state, name)
    scales = scales if scales.shape == value.shape else each(scales, value)
    value = numbers(value, scales, table) if value.dtype == torch.uint8 else value
    return coded(value, scales, table) if state[name].dtype == torch.uint8 else (value, scales)


def _table(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The numbers that codes stand for: with a sign in the first moment, without one in the second."""
    if TABLES[name] in state:
        return state[TABLES[name]]
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == "state1").to(state[name].device)
