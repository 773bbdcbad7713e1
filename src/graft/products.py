"""Products of large matrices of float32 on the CPU, by whichever of PyTorch's libraries is the quicker one there.

PyTorch takes them from MKL, which leaves half of AVX-512's width unused on AMD's processors; oneDNN, which comes with
PyTorch too, does not. Both round in float32; sums are added up in another order. Small products stay with MKL, which
begins sooner. `torch.backends.mkldnn.set_flags(False)` leaves all of them there.

Shapes: rows n, channels k and m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import nn

from graft.machine import maker

LEAST = 1 << 21
"""Multiplications from which on oneDNN is quicker, what it takes to begin included."""


@lru_cache(maxsize=1)
def quicker() -> bool:
    """Whether oneDNN is quicker here: told by the processor, not by a clock, so that runs give the same bytes."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and maker() == "AuthenticAMD" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def suits(a: torch.Tensor, b: torch.Tensor, products: int) -> bool:
    """Whether oneDNN takes so many products of numbers of a and b: both of float32 on the CPU, and quicker here."""
    if products < LEAST or not (a.dtype is b.dtype is torch.float32 and a.is_cpu and b.is_cpu):
        return False
    return quicker() and bool(torch.backends.mkldnn.enabled)


def product(a_nk: torch.Tensor, b_km: torch.Tensor) -> torch.Tensor:
    """a times b: `[n, m]`, for formulas of gradients: where those are to be derived, PyTorch computes it."""
    derived = torch.is_grad_enabled() and (a_nk.requires_grad or b_km.requires_grad)
    if derived or not suits(a_nk, b_km, a_nk.numel() * b_km.shape[1]):
        return a_nk @ b_km
    return _by_onednn(a_nk, b_km, None)


def _by_onednn(a_nk: torch.Tensor, b_km: torch.Tensor, bias_m: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(a_nk, b_km.t(), bias_m, "none", [], "")
    return found


class _Affine(torch.autograd.Function):
    """x b + bias and its gradients; what is frozen has none, and nothing is held for it."""

    @staticmethod
    def forward(ctx: Any, x_nk: torch.Tensor, b_km: torch.Tensor, bias_m: torch.Tensor | None) -> torch.Tensor:
        of_x, of_b, _ = ctx.needs_input_grad
        ctx.turned = not b_km.is_contiguous()
        ctx.save_for_backward(x_nk if of_b else None, b_km if of_x else None)
        return _by_onednn(x_nk, b_km, bias_m)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_nm,), (x_nk, b_km) = upstream, ctx.saved_tensors
        of_x, of_b, of_bias = ctx.needs_input_grad
        g_b = None
        if of_b:  # laid out as the weight is
            g_b = product(g_nm.t(), x_nk).t() if ctx.turned else product(x_nk.t(), g_nm)
        return product(g_nm, b_km.t()) if of_x else None, g_b, g_nm.sum(0) if of_bias else None


def _plain(x: Any, weight: Any) -> bool:
    """Whether tensors are what they are taken for, and computed with now, in their own type."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    known = type(x) is torch.Tensor and type(weight) in (nn.Parameter, torch.Tensor)
    return known and not traced and not torch.is_autocast_enabled("cpu")


Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def _quick(forward: Forward, turned: bool) -> Forward:
    """A linear layer's forward, by oneDNN where that suits. `turned`: its weight is `[outputs, inputs]`."""

    def quick(self: Any, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        products = input.numel() * weight.shape[0 if turned else -1]
        if not suits(input, weight, products) or not _plain(input, weight):
            return forward(self, input)
        compute = _Affine.apply if torch.is_grad_enabled() else _by_onednn
        flat = compute(input.reshape(-1, input.shape[-1]), weight.t() if turned else weight, self.bias)
        return flat.view(*input.shape[:-1], flat.shape[-1])  # a view: an output of _Affine is not changed in place

    return quick


class _Layers:
    """The forwards of linear layers in this process: how many want them quick, and what they are otherwise."""

    lock, wanted = Lock(), 0
    were: ClassVar[dict[Any, Forward]] = {}


@contextmanager
def quick_layers() -> Iterator[None]:
    """Inside, linear layers compute as `product` does, forward and backward, wherever in the process they are called.

    May be entered several times, and by several threads. Does nothing where oneDNN is not quicker.
    """
    from transformers.pytorch_utils import Conv1D

    with _Layers.lock:
        _Layers.wanted += 1
        if _Layers.wanted == 1 and quicker():
            for layer in (nn.Linear, Conv1D):
                _Layers.were[layer] = layer.forward
                layer.forward = _quick(layer.forward, turned=layer is nn.Linear)  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _Layers.lock:
            _Layers.wanted -= 1
            if _Layers.wanted == 0:
                for layer, forward in _Layers.were.items():
                    layer.forward = forward
                _Layers.were.clear()
