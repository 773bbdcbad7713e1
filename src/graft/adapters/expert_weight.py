"""The weight of fused experts as a tensor that knows a low-rank change: products with it are two, and two small ones.

Nothing of the weight's size is made, and the frozen weight gets no gradient. Shapes: experts e, rows a and columns b of
each matrix as it lies in memory, rank r; `left [e, a, r]` times `right [e, r, b]` is the change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad
from torch.utils._pytree import tree_map_only

from graft.adapters.low_rank import added
from graft.errors import RequestError

ALIGNED = 16
"""Bytes that rows of what grouped products read must be a multiple of."""


@dataclass(frozen=True)
class Part:
    """`scale` times `left` times `right`; what is multiplied by them goes through `dropout` first."""

    left: torch.Tensor
    right: torch.Tensor
    scale: Any
    dropout: nn.Dropout | None = None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Part:
        """Both factors changed alike."""
        return replace(self, left=change(self.left), right=change(self.right))

    def turned(self) -> Part:
        """The change of the transposed weight."""
        return replace(self, left=self.right.mT, right=self.left.mT)

    def ready(self, x: torch.Tensor) -> torch.Tensor:
        """x in the factors' dtype, thinned out."""
        x = x.to(self.left.dtype)
        return x if self.dropout is None else self.dropout(x)

    def joined(self, h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """h with `delta` times the scale, in the dtype of h."""
        if isinstance(self.scale, float):
            return torch.add(h, delta.to(h.dtype), alpha=self.scale)
        return h + (self.scale * delta).to(h.dtype)

    def beside(self, h: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """h with scale · x downᵀ upᵀ, of `down [r, inputs]` and `up [outputs, r]`."""
        source = self.ready(x)
        alike = h.dtype == x.dtype == down.dtype and isinstance(self.scale, float)
        if alike and h.dim() == 2 and not torch.is_autocast_enabled(h.device.type):
            return added(h, source, down, up, self.scale)
        return self.joined(h, linear(linear(source, down), up))


class ExpertWeight(torch.Tensor):
    """A frozen weight [e, a, b], one of its matrices or some of them, with the parts of its change.

    Indexing its experts, transposing its matrices and products with it know the change; everything that is asked of its
    shape, type and place is the weight's; whatever else is done with it is done with the sum.
    """

    parts: Sequence[Part]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What `func` gives of weights that know a change."""
        name, options = _name(func), kwargs or {}
        if name in ABOUT or (func.__name__ == "__get__" and name not in SEEN):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **options)
        if name in KNOWN:
            found = KNOWN[name](func, *args, **options)
            if found is not NotImplemented:
                return found
        return func(*_summed(list(args), name), **_summed(dict(options), name))


def with_change(weight: torch.Tensor, parts: Sequence[Part]) -> ExpertWeight:
    """`weight`, sharing its memory, with the parts of its change."""
    made = weight.as_subclass(ExpertWeight)
    made.parts = parts
    return made


def summed(weight: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """The weight and its change as one plain tensor, in the dtype of the weight."""
    whole = weight
    for part in parts:
        whole = whole + (part.scale * (part.left @ part.right)).reshape(weight.shape)
    return whole.to(weight.dtype)


def drops(parts: Sequence[Part]) -> bool:
    """Whether dropout changes anything now."""
    each = [part.dropout for part in parts if part.dropout is not None]
    return any(one.training or type(one) is not nn.Dropout for one in each)


def check_undropped(parts: Sequence[Part], how: str) -> None:
    """Raises RequestError where inputs are to be dropped and products are not seen."""
    if drops(parts):
        raise RequestError(
            f"this model computes its experts by {how}, where inputs cannot be dropped for the adapter alone: use "
            "`dropout: 0` on experts"
        )


def _name(func: Any) -> str:
    """Of a function, a method, a property's getter or an operation."""
    owner = func.__self__ if func.__name__ == "__get__" else func
    # what has no name is taken for something that reads the numbers
    return str(getattr(owner, "__name__", "data")).partition(".")[0]


def _plain(weight: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return weight.as_subclass(torch.Tensor)


def _summed(tree: Any, name: str) -> Any:
    def whole(weight: ExpertWeight) -> torch.Tensor:
        check_undropped(weight.parts, name)
        return summed(_plain(weight), weight.parts)

    return tree_map_only(ExpertWeight, whole, tree)


def _is_stacked(weight: ExpertWeight) -> bool:
    """Whether the experts' rows lie below each other in one matrix."""
    return any(part.left.dim() > weight.dim() for part in weight.parts)


def _item(func: Any, weight: ExpertWeight, key: Any) -> Any:
    """Experts by number, a tensor of numbers, a mask, or a range."""
    single = isinstance(key, int | slice) or (isinstance(key, torch.Tensor) and key.dim() < 2)
    if weight.dim() != 3 or isinstance(key, bool) or not single:
        return NotImplemented
    return with_change(_plain(weight)[key], [part.each(lambda factor: factor[key]) for part in weight.parts])


def _select(func: Any, weight: ExpertWeight, dim: int, index: Any) -> Any:
    return _item(func, weight, index) if dim == 0 else NotImplemented


def _unbind(func: Any, weight: ExpertWeight, dim: int = 0) -> Any:
    if weight.dim() != 3 or dim != 0:
        return NotImplemented
    return tuple(_item(func, weight, number) for number in range(weight.shape[0]))


def _turn(func: Any, weight: ExpertWeight, *dims: Any, **named: Any) -> Any:
    """Rows for columns."""
    if _is_stacked(weight) or named or (_name(func) == "T" and weight.dim() != 2):
        return NotImplemented
    around = {dim % weight.dim() for dim in dims if isinstance(dim, int)} or {weight.dim() - 2, weight.dim() - 1}
    if around != {weight.dim() - 2, weight.dim() - 1}:
        return NotImplemented
    return with_change(_plain(weight).mT, [part.turned() for part in weight.parts])


def _apart(func: Any, weight: ExpertWeight, *shape: Any, **named: Any) -> Any:
    """Experts that lie below each other as [e, a, b]."""
    if not _is_stacked(weight) or named:
        return NotImplemented
    apart = func(_plain(weight), *shape)
    whole = all((*part.left.shape[:2], part.right.shape[2]) == apart.shape for part in weight.parts)
    return with_change(apart, weight.parts) if whole else NotImplemented


def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    """x Wᵀ of one expert."""
    if not _is_factor(weight, input, 2):
        return NotImplemented
    h = func(input, _plain(weight), bias)
    for part in weight.parts:
        h = part.beside(h, input, part.right, part.left)
    return h


def _product(func: Any, *factors: Any, **named: Any) -> Any:
    """x W or W x of one expert or of several, each with its own x."""
    if named or len(factors) != 2:
        return NotImplemented
    first, second = factors
    if _name(func) == "__rmatmul__":
        func, first, second = torch.matmul, second, first
    if _is_factor(second, first):
        h = func(first, _plain(second))
        for part in second.parts:
            if part.left.dim() == 2:
                h = part.beside(h, first, part.left.mT, part.right.mT)
            else:
                h = part.joined(h, part.ready(first) @ part.left @ part.right)
        return h
    if _is_factor(first, second):
        h = func(_plain(first), second)
        for part in first.parts:
            h = part.joined(h, part.left @ (part.right @ part.ready(second)))
        return h
    return NotImplemented


def _grouped(func: Any, x: Any = None, weight: Any = None, offs: Any = None, **named: Any) -> Any:
    """Rows of x in groups, one for each expert: x W."""
    if not _is_factor(weight, x, 3) or offs is None or x.dim() != 2:
        return NotImplemented
    h = func(x, _plain(weight), offs=offs, **named)
    for part in weight.parts:
        left, right = _aligned(part)
        h = part.joined(h, func(func(part.ready(x), left, offs=offs), right, offs=offs))
    return h


def _aligned(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors with ranks of nothing, so many as grouped products want."""
    rank = part.left.shape[-1]
    missing = -rank % (ALIGNED // part.left.element_size())
    return (pad(part.left, (0, missing)), pad(part.right, (0, 0, 0, missing))) if missing else (part.left, part.right)


def _is_factor(weight: Any, x: Any, dims: int | None = None) -> bool:
    """Whether `weight` knows a change, is no stack, and stands beside a plain x."""
    if not isinstance(weight, ExpertWeight) or isinstance(x, ExpertWeight) or not isinstance(x, torch.Tensor):
        return False
    return not _is_stacked(weight) and (dims is None or weight.dim() == dims) and x.dim() > 1


ABOUT = frozenset({
    "size", "dim", "ndimension", "stride", "storage_offset", "data_ptr", "numel", "nelement", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "get_device", "untyped_storage", "__len__", "__hash__",
    "__repr__", "__format__",
})  # fmt: skip
"""Functions that ask for a tensor's shape, type and place."""
SEEN = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
"""Properties that are made of a tensor's numbers."""
KNOWN: Mapping[str, Callable[..., Any]] = {
    "__getitem__": _item, "index_select": _select, "unbind": _unbind,
    "transpose": _turn, "swapaxes": _turn, "swapdims": _turn, "t": _turn, "T": _turn, "mT": _turn,
    "view": _apart, "reshape": _apart,
    "linear": _linear, "matmul": _product, "__matmul__": _product, "__rmatmul__": _product, "mm": _product,
    "bmm": _product, "grouped_mm": _grouped, "_grouped_mm": _grouped, "grouped_mm_fallback": _grouped,
}  # fmt: skip
"""What knows the change; each gives NotImplemented for what it does not."""
