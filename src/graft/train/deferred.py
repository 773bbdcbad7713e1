"""Logits that are not computed before it is known what for, so that a loss can take them a few positions at a time.

The model's forward runs as ever, but its output layer gives a stand-in. What a model does with its logits number by
number (a scale, a cap, a bias) the stand-in remembers, to be done to those positions that are asked for; whatever else
is done with it computes all logits first, so that nothing changes for the model.

Shapes: positions n, channels k, vocabulary v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

NUMBER_BY_NUMBER = {
    "add", "__add__", "__radd__", "sub", "__sub__", "mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide",
    "tanh", "float", "to", "contiguous",
}  # fmt: skip
"""Functions that make one number of one number, and perhaps of one of a vector over the vocabulary."""
FACTS = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.__len__}
"""What a tensor is asked that takes no numbers to answer."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layer:
    """What a linear layer had when it was called; behind the call it may have other weights again."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Step:
    """A function of NUMBER_BY_NUMBER with what it takes beside the logits."""

    function: Callable[..., torch.Tensor]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def __call__(self, logits_nv: torch.Tensor) -> torch.Tensor:
        """What it makes of logits; new ones."""
        return self.function(*(logits_nv if a is _LOGITS else a for a in self.arguments), **self.options)


_LOGITS = object()
"""Where they stand among a step's arguments."""


class Deferred(torch.Tensor):
    """Logits `[…, v]`: what `steps` make of a linear layer's output for `hidden […, k]`, none of which is there yet."""

    hidden: torch.Tensor
    layer: Layer
    kind: torch.dtype
    """The type of the linear layer's output; steps may give another."""
    steps: tuple[Step, ...]
    whole: torch.Tensor | None
    """All of it, once something had to have it."""

    @staticmethod
    def of(head: nn.Linear, hidden: torch.Tensor, kind: torch.dtype) -> Deferred:
        """The output of `head`, whose type would be `kind`."""
        return Deferred._made(Layer(head.weight, head.bias), hidden, kind, (), kind)

    @staticmethod
    def _made(
        layer: Layer, hidden: torch.Tensor, kind: torch.dtype, steps: tuple[Step, ...], last: torch.dtype
    ) -> Deferred:
        learned = torch.is_grad_enabled() and (hidden.requires_grad or layer.weight.requires_grad)
        shape = (*hidden.shape[:-1], len(layer.weight))
        made: Deferred = torch.Tensor._make_wrapper_subclass(
            Deferred, shape, dtype=last, device=hidden.device, requires_grad=learned
        )
        made.layer, made.hidden, made.kind, made.steps, made.whole = layer, hidden, kind, steps, None
        return made

    def computed(self) -> torch.Tensor:
        """All logits, as the model would have had them."""
        if self.whole is None:
            found = nn.Linear.forward(self.layer, self.hidden)  # type: ignore[arg-type]
            for step in self.steps:
                found = step(found)
            self.whole = found
        return self.whole

    def _behind(self, step: Step) -> Deferred | None:
        """This with one more step, if that leaves its shape as it is."""
        probe = torch.empty(0, len(self.layer.weight), device=self.hidden.device, dtype=self.kind)
        for one in (*self.steps, step):
            probe = one(probe)
        if probe.shape != (0, len(self.layer.weight)) or probe.device != self.hidden.device:
            return None
        return Deferred._made(self.layer, self.hidden, self.kind, (*self.steps, step), probe.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        step = _step(func, args, kwargs)
        if step is not None:
            mine = next(a for a in args if isinstance(a, Deferred))
            found = mine._behind(step) if mine.whole is None else None
            if found is not None:
                return found
        args, kwargs = tree_map_only(Deferred, Deferred.computed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} was called on logits that are not computed, past what would compute them")


def _step(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Step | None:
    """The step that a call on deferred logits is, if it is one: all else that it takes is the same at each position."""
    if getattr(function, "__name__", "") not in NUMBER_BY_NUMBER or any(
        isinstance(value, torch.Tensor) for value in options.values()
    ):
        return None
    if sum(isinstance(a, Deferred) for a in arguments) != 1:
        return None
    taken: list[Any] = []
    most = next(a for a in arguments if isinstance(a, Deferred)).dim()
    for argument in arguments:
        if isinstance(argument, Deferred):
            taken.append(_LOGITS)
        elif not isinstance(argument, torch.Tensor):
            taken.append(argument)
        elif argument.requires_grad or argument.shape[:-1].numel() != 1 or argument.dim() > most:
            return None
        else:
            taken.append(argument.reshape(argument.shape[-1:]))
    return Step(function, tuple(taken), options)


def output_layer(model: Any) -> nn.Linear | None:
    """The layer that makes a model's logits, if that is a plain linear one and nothing else has a hand in it."""
    asked = getattr(model, "get_output_embeddings", None)
    head = asked() if asked is not None else None
    if type(head) is not nn.Linear or getattr(model, "_compiled_call_impl", None) is not None:
        return None
    heard = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    return None if heard or "forward" in vars(head) else head


def _type_of_output(head: nn.Linear, hidden: torch.Tensor) -> torch.dtype | None:
    """That of `head(hidden)`; None where it is for others to compute it: in parts, in traces, in other types."""
    plain = type(hidden) is torch.Tensor and all(type(p) in (nn.Parameter, torch.Tensor) for p in _weights(head))
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if not plain or traced or head.weight.shape != (head.out_features, hidden.shape[-1]):
        return None
    types = {hidden.dtype, *(p.dtype for p in _weights(head))}
    if not types <= set(TYPES):
        return None
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype if len(types) == 1 else None


def _weights(head: nn.Linear) -> list[torch.Tensor]:
    return [head.weight] if head.bias is None else [head.weight, head.bias]


@contextmanager
def deferring(head: nn.Linear) -> Iterator[None]:
    """Inside, the output of `head` is deferred wherever that can be."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        kind = _type_of_output(head, hidden)
        return type(head).forward(head, hidden) if kind is None else Deferred.of(head, hidden, kind)

    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]


Loss = Callable[[torch.Tensor], torch.Tensor]
"""A scalar of logits `[…, v]`, which may be deferred."""


def loss_of_logits(model: Any, inputs: Mapping[str, Any], loss: Loss) -> torch.Tensor:
    """`loss` of the logits that a model gives for `inputs`, which are deferred where that can be.

    `model` may be wrapped in a module that gives what it gives, as those do that hold it in parts; or something else
    may stand for it, which has it as `module` and may change its logits.
    """
    plain = getattr(model, "module", model)
    head = output_layer(plain)
    if head is None:
        return loss(model(**inputs).logits)
    with deferring(head):
        if not isinstance(model, nn.Module):
            return loss(model(**inputs).logits)
        with _answering(plain, loss):
            return model(**inputs).logits


@contextmanager
def _answering(model: nn.Module, loss: Loss) -> Iterator[None]:
    """Inside, a model gives the loss of its logits in their place.

    That is before what holds it in parts takes its weights apart, and what that sees come out has a gradient.
    """

    def answer(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        outputs.logits = loss(outputs.logits)
        return outputs

    handle = model.register_forward_hook(answer, prepend=True)
    try:
        yield
    finally:
        handle.remove()
