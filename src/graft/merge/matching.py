"""Weight matching: the order of one model's units in which its weights agree best with another model's.

Ainsworth et al. 2023, Git Re-Basin, arXiv:2209.04836, algorithm 1: the sum of the inner products of all tensors is
raised by choosing the order of one kind of units at a time, the others held, which is a linear assignment each; until
nothing changes. Heads are assigned by the best they can reach with their value channels (and, where several query heads
share a key, their query heads) put into the best order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graft.checkpoint import TensorReader, TensorWriter
from graft.merge.stream import Source
from graft.merge.symmetry import RESIDUAL, Axis, Symmetries

Order = np.ndarray
"""`order [units] int64`: unit i of the aligned model is unit `order[i]` of the one it was."""
Array = np.ndarray
Stamp = tuple[int, ...]


class Matching:
    """Orders of the units of model `b` that make it agree with model `a`; both are read a tensor at a time.

    Raises CheckpointError, naming folder and tensor, where NaN or Inf are read.

    What an order follows from, and a tensor's part in the agreement, are read again only where another order in it has
    changed since: the last rounds of a search read little.
    """

    def __init__(self, known: Symmetries, a: TensorReader, b: TensorReader):
        self.known, self.a, self.b = known, a, b
        self.names = [name for name in known.axes if name in a.headers and name in b.headers]
        heads = known.heads
        kinds = {"q": heads.groups * heads.each, "o": heads.groups * heads.each, "k": heads.groups, "v": heads.groups}
        self.orders: dict[str, Order] = {unit: np.arange(size) for unit, size in known.sizes.items()}
        for layer in known.layers:
            self.orders |= {f"{layer}:{kind}": np.arange(count * heads.size) for kind, count in kinds.items()}
        self._matched: dict[str, Stamp] = {}
        """Units → what their order followed from."""
        self._products: dict[str, tuple[Stamp, float]] = {}
        """Tensor → its inner product in both models, and in which orders."""
        self._squares: tuple[float, float] | None = None

    def search(self, rounds: int) -> list[float]:
        """Improve until nothing changes, `rounds` times at most; the agreement at the start and after each round."""
        reached = [self.agreement()]
        while len(reached) <= rounds:
            self._match_units(RESIDUAL, self.names)
            for layer in self.known.layers:
                own = [name for name in self.names if name.startswith(f"{layer}.")]
                if f"{layer}:mlp" in self.orders:
                    self._match_units(f"{layer}:mlp", own)
                self._match_heads(layer, own)
            reached.append(self.agreement())
            if reached[-1] - reached[-2] < 1e-6:
                break
        return reached

    def agreement(self) -> float:
        """Cosine between all weights of `a` and of `b` in the orders found."""
        if self._squares is None:
            # no order changes them
            self._squares = (_square(self.a, self.names), _square(self.b, self.names))
        both = sum(self._product(name) for name in self.names)
        return both / max(np.sqrt(self._squares[0] * self._squares[1]), 1e-30)

    def _product(self, name: str) -> float:
        """The inner product of a tensor of `a` and that of `b` in the orders found."""
        stamp = self._stamp([name])
        if self._products.get(name, (None, 0.0))[0] != stamp:
            self._products[name] = (stamp, float(np.vdot(_values(self.a, name), self._ordered(name))))
        return self._products[name][1]

    def _stamp(self, names: list[str], without: Collection[str] = ()) -> Stamp:
        """Stands for the orders along the axes of some tensors, all but those of `without`."""
        units = {unit for name in names for axis in self.known.axes[name] for unit in axis} - set(without)
        return tuple(hash(self.orders[unit].tobytes()) for unit in sorted(units))

    def _follows_anew(self, units: Sequence[str], names: list[str]) -> bool:
        """Whether anything that the order of `units` follows from, in tensors that have them, is new; notes it."""
        having = [name for name in names if any(unit in axis for axis in self.known.axes[name] for unit in units)]
        stamp = self._stamp(having, units)
        new = self._matched.get(units[0]) != stamp
        self._matched[units[0]] = stamp
        return new

    def _ordered(self, name: str, without: str | None = None) -> Array:
        """The tensor of `b` with every axis in its order, those along which `without` stands left as they are."""
        return reordered(_values(self.b, name), self.known.axes[name], self.orders, without)

    def _match_units(self, unit: str, names: list[str]) -> None:
        """The best order of one kind of units, by all tensors that have them."""
        if not self._follows_anew([unit], names):
            return
        size = len(self.orders[unit])
        gain = np.zeros((size, size), np.float64)
        for name in names:
            for x, y in self._along(name, unit):
                gain += x @ y.T
        self.orders[unit] = _assigned(gain)

    def _along(self, name: str, unit: str) -> Iterator[tuple[Array, Array]]:
        """[units, rest] of `a` and of `b` (in its own order along the axis), for each place where `unit` stands."""
        axes = self.known.axes[name]
        if not any(unit in axis for axis in axes):
            return
        x, y = _values(self.a, name), self._ordered(name, without=unit)
        for place, axis in enumerate(axes):
            start = 0
            for label in axis:
                size = len(self.orders[label])
                if label == unit:
                    rows = slice(start, start + size)
                    first, second = np.moveaxis(x, place, 0)[rows], np.moveaxis(y, place, 0)[rows]
                    yield first.reshape(size, -1), second.reshape(size, -1)
                start += size

    def _match_heads(self, layer: str, names: list[str]) -> None:
        """The best order of the layer's heads, with what is inside of them."""
        if not self._follows_anew([f"{layer}:{kind}" for kind in "qkvo"], names):
            return
        q, k, v, o = (self._heads(f"{layer}:{kind}", names) for kind in "qkvo")
        if q is None or k is None or v is None or o is None:
            return
        groups, each, size = self.known.heads.groups, self.known.heads.each, self.known.heads.size
        gain = np.zeros((groups, groups))
        inner: dict[tuple[int, int], tuple[Order, Order]] = {}
        for i in range(groups):
            for j in range(groups):
                pair = (q[0][i], q[1][j]), (v[0][i, 0], v[1][j, 0]), (o[0][i], o[1][j])
                gain[i, j], inner[i, j] = _inside(*pair)
                gain[i, j] += float(np.vdot(k[0][i], k[1][j]))
        order = _assigned(gain)
        whole = np.arange(size)
        parts: dict[str, list[Order]] = {kind: [] for kind in "qkvo"}
        for i, j in enumerate(order):
            within, channels = inner[i, j]
            heads = j * each + within
            parts["k"].append(j * size + whole)
            parts["v"].append(j * size + channels)
            parts["q"] += [head * size + whole for head in heads]
            parts["o"] += [head * size + channels for head in heads]
        for kind, found in parts.items():
            self.orders[f"{layer}:{kind}"] = np.concatenate(found)

    def _heads(self, unit: str, names: list[str]) -> tuple[Array, Array] | None:
        """[groups, heads of a group, channels, rest] of `a` and `b`: everything that stands along these units."""
        found = [pair for name in names for pair in self._along(name, unit)]
        if not found:
            return None
        x, y = (np.concatenate(side, axis=1) for side in zip(*found, strict=True))
        heads = len(x) // self.known.heads.size
        shape = (self.known.heads.groups, heads // self.known.heads.groups, self.known.heads.size, x.shape[1])
        return x.reshape(shape), y.reshape(shape)


def _inside(
    q: tuple[Array, Array], v: tuple[Array, Array], o: tuple[Array, Array]
) -> tuple[float, tuple[Order, Order]]:
    """How well one group of heads can agree with another (apart from its key), and the orders of heads and channels.

    `q [heads, channels, rest]`, `v [channels, rest]`, `o [heads, channels, rest]` of both sides.
    """
    heads = _assigned(np.einsum("hcr,gcr->hg", *q))
    channels = np.arange(v[0].shape[0])
    for _ in range(2):
        gain = v[0] @ v[1].T + np.einsum("hcr,hdr->cd", o[0], o[1][heads])
        channels = _assigned(gain)
        heads = _assigned(np.einsum("hcr,gcr->hg", *q) + np.einsum("hcr,gcr->hg", o[0], o[1][:, channels]))
    reached = np.vdot(q[0], q[1][heads]) + np.vdot(v[0], v[1][channels]) + np.vdot(o[0], o[1][heads][:, channels])
    return float(reached), (heads, channels)


def reordered(values: Any, axes: tuple[Axis, ...], orders: Mapping[str, Order], without: str | None = None) -> Any:
    """`values` with every axis taken in the order of its units."""
    for place, axis in enumerate(axes):
        if not axis or without in axis:
            continue
        values = np.take(values, _whole_order(axis, orders), axis=place)
    return values


def _assigned(gain: Array) -> Order:
    """The assignment of columns to rows with the largest sum."""
    from scipy.optimize import linear_sum_assignment

    if gain.shape == (1, 1):
        return np.zeros(1, np.int64)
    return np.asarray(linear_sum_assignment(gain, maximize=True)[1], np.int64)


def _values(reader: TensorReader, name: str) -> Array:
    return Source(str(reader.folder), reader, name).read().numpy()


def _square(reader: TensorReader, names: list[str]) -> float:
    return sum(float(np.vdot(values, values)) for values in (_values(reader, name) for name in names))


def write_aligned(reader: TensorReader, known: Symmetries, orders: Mapping[str, Order], out: Path) -> None:
    """The model in another order, in the folder `out`: the same names, types and shapes."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    writer = TensorWriter(out, {name: (h.dtype, h.shape) for name, h in reader.headers.items()})
    try:
        for name in reader.names:
            values = reader.read(name)
            if name in known.axes:
                for place, axis in enumerate(known.axes[name]):
                    if axis:
                        values = values.index_select(place, torch.from_numpy(_whole_order(axis, orders)))
            writer.write(name, 0, memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    finally:
        writer.close()


def _whole_order(axis: Axis, orders: Mapping[str, Order]) -> Order:
    steps, start = [], 0
    for label in axis:
        steps.append(orders[label] + start)
        start += len(orders[label])
    return np.concatenate(steps)
