"""A low-rank change as few operations, with its gradients: of any h, and of what a linear layer has just computed.

Shapes: rows n (all leading dimensions), channels i and o, rank r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from graft.products import product


class _Added(torch.autograd.Function):
    """h + scale · x downᵀ upᵀ and its gradients: rows n, channels i and o, rank r.

    Each product is written so that the rank comes first: on a CPU those with so short a side take two to six times as
    long in the layouts that autograd would choose. h is read once: the product is added as it is made.
    """

    @staticmethod
    def forward(
        ctx: Any, h_no: torch.Tensor, x_ni: torch.Tensor, down_ri: torch.Tensor, up_or: torch.Tensor, scale: float
    ) -> torch.Tensor:
        low_rn = product(down_ri, x_ni.t())
        ctx.save_for_backward(x_ni, down_ri, up_or, low_rn)
        ctx.scale = scale
        return torch.addmm(h_no, low_rn.t(), up_or.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_no,), (x_ni, down_ri, up_or, low_rn) = upstream, ctx.saved_tensors
        _, of_x, of_down, of_up, _ = ctx.needs_input_grad
        g_rn = product(up_or.t(), g_no.t()).mul_(ctx.scale) if of_x or of_down else None
        return (
            g_no,
            product(g_rn.t(), down_ri) if of_x and g_rn is not None else None,
            product(g_rn, x_ni) if of_down and g_rn is not None else None,
            product(low_rn, g_no).mul_(ctx.scale).t() if of_up else None,
            None,
        )


def added(
    h_no: torch.Tensor, x_ni: torch.Tensor, down_ri: torch.Tensor, up_or: torch.Tensor, scale: float
) -> torch.Tensor:
    """`[n, outputs]` h + scale · x downᵀ upᵀ, all of one dtype."""
    found: torch.Tensor = _Added.apply(h_no, x_ni, down_ri, up_or, scale)
    return found


def bare(module: nn.Module, x: Any, h: Any) -> bool:
    """Whether h is, or may be taken for, W x + b of a frozen linear layer in full, held as torch holds it.

    Not where W lies in parts, is packed, comes and goes (ZeRO), or is computed.
    """
    if type(module) is not nn.Linear or type(x) is not torch.Tensor or x.dtype is not h.dtype:
        return False
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)  # type: ignore[union-attr]
    plain = type(weight) is nn.Parameter and not hasattr(weight, "ds_id") and weight.dtype is h.dtype
    return frozen and plain and h.is_contiguous()


class _Beside(torch.autograd.Function):
    """W x + b + scale · up down x from W x + b, which it changes in place, out of autograd's sight.

    The gradient of x is then one product, with W + scale · up down, where there are so many rows that adding to the
    weight costs less than adding to the gradient; and nothing is added up that the layer and its change give apart.
    """

    @staticmethod
    def forward(
        ctx: Any, held: list[torch.Tensor], x: torch.Tensor, weight_oi: torch.Tensor, down_ri: torch.Tensor,
        up_or: torch.Tensor, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        h, x_ni = held.pop().data, x.reshape(-1, x.shape[-1])
        low_rn = product(down_ri, x_ni.t())
        h.view(-1, h.shape[-1]).addmm_(low_rn.t(), up_or.t(), alpha=scale)
        ctx.save_for_backward(x, weight_oi, down_ri, up_or, low_rn)
        ctx.scale = scale
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,), (x, weight_oi, down_ri, up_or, low_rn) = upstream, ctx.saved_tensors
        _, of_x, _, of_down, of_up, _ = ctx.needs_input_grad
        g_no = g.reshape(-1, g.shape[-1])
        whole = _worth_adding(len(g_no), weight_oi)
        g_rn = product(up_or.t(), g_no.t()).mul_(ctx.scale) if of_down or (of_x and not whole) else None
        g_x = None
        if of_x and (whole or g_rn is None):
            g_x = product(g_no, torch.addmm(weight_oi, up_or, down_ri, alpha=ctx.scale))
        elif of_x:
            g_x = product(g_no, weight_oi).addmm_(g_rn.t(), down_ri)  # type: ignore[union-attr]
        return (
            None,
            g_x if g_x is None else g_x.view(x.shape),
            None,
            product(g_rn, x.reshape(-1, x.shape[-1])) if of_down and g_rn is not None else None,
            product(low_rn, g_no).mul_(ctx.scale).t() if of_up else None,
            None,
        )


def _worth_adding(rows: int, weight_oi: torch.Tensor) -> bool:
    """Whether the change is added to the weight for these rows: never in half precision, which would lose it."""
    o, i = weight_oi.shape
    return weight_oi.dtype in (torch.float32, torch.float64) and rows * (i + o) > 2 * i * o


def beside(
    h: torch.Tensor, x: torch.Tensor, weight_oi: torch.Tensor, down_ri: torch.Tensor, up_or: torch.Tensor, scale: float
) -> torch.Tensor:
    """h `[…, o]` = W x + b with scale · up down x, in place: nothing else may hold it, and W is frozen (`bare`)."""
    found: torch.Tensor = _Beside.apply([h], x, weight_oi, down_ri, up_or, scale)
    return found
