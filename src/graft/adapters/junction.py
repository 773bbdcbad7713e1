"""Where sites meet one module of the model: hooks, x from elsewhere, and the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from graft.adapters.forms import LowRank, Site
from graft.adapters.low_rank import bare, beside
from graft.adapters.places import Place
from graft.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.adapters.stack import Adapters


class Junction:
    """Where sites meet one module: its hooks, and x where that is read elsewhere."""

    def __init__(self, stack: Adapters, model: PreTrainedModel, place: Place):
        self.stack = stack
        self.sites: dict[str, list[Site]] = {}
        self.x: torch.Tensor | None = None
        self.gathered: Gathered | None = None
        self.light: list[Light] | None = None
        """What runs, if all of it is plain low-rank: where a gradient is wanted, only one that is alone."""
        self.prepared: Any = None
        """The active adapters that `light` is of."""
        self.type: torch.dtype | None = None
        self.of: list[LowRank] = []
        """The sites that `light` is of."""
        self.place, self.apart = place, place.source != place.target
        target = model.get_submodule(place.target)
        if place.before:
            self.handles = [target.register_forward_pre_hook(self.change_input)]
            return
        self.handles = [target.register_forward_hook(self.change_output)]
        if self.apart:
            self.handles.append(model.get_submodule(place.source).register_forward_pre_hook(self.read))

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep x, the input of the source."""
        self.x = args[0]

    def change_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The target's input with what the sites do to it."""
        return (self.joined(args[0], None), *args[1:])

    def change_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The target's output with what the sites do to it; of a tuple, the first."""
        if self.prepared is not self.stack.active:
            self._prepare()
        if self.light is not None and args and self._applies(output):
            if not torch.is_grad_enabled():
                for site in self.light:
                    output = site.added(output, args[0])
                return output
            if len(self.light) == 1 and self._first(module) and bare(module, args[0], output):
                site = self.light[0]
                return beside(output, args[0], module.weight, *site.held(), site.scale)  # type: ignore[arg-type]
        x = self.x if self.apart else args[0] if args else None
        self.x = None
        h = output[0] if isinstance(output, tuple) else output
        if x is None or x.shape[:-1] == h.shape[:-1] or not x.is_floating_point():
            joined = self.joined(h, x)
        elif not self._reads():
            joined = self.joined(h, None)
        else:
            x = self._in_order(x, h)
            joined = self.joined(h.reshape(*x.shape[:-1], -1), x).reshape(h.shape)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined

    def _reads(self) -> bool:
        """Whether a site here is made from x."""
        return any(not getattr(site, "after", True) for sites in self.sites.values() for site in sites)

    def _in_order(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """x by rows and tokens, where h has all tokens of all rows in a row. Raises RequestError for another order."""
        if x.dim() == h.dim() or x[..., 0].numel() != h[..., 0].numel():
            raise RequestError(
                f"{self.place.path}: expected what goes in and what comes out in one order of rows and tokens, found "
                f"{list(x.shape[:-1])} at {self.place.source} and {list(h.shape[:-1])} at {self.place.target}: use "
                "lora, or an adapter at another place"
            )
        return x if x.dim() > h.dim() else x.reshape(*h.shape[:-1], -1)

    def _prepare(self) -> None:
        """Whether the active sites may run without more ado: plain low-rank ones of one type beside a linear layer."""
        self.prepared, self.light = self.stack.active, None
        active = [(site, weight) for name, weight in self.stack.active for site in self.sites.get(name, ())]
        plain = [(s, weight) for s, weight in active if isinstance(s, LowRank) and s.plain and not s.after]
        types = {site.down.dtype for site, _ in plain}
        if self.place.single and len(plain) == len(active) and len(types) == 1:
            self.light = [Light(site, float(site.scale * weight)) for site, weight in plain]
            self.type, self.of = types.pop(), [site for site, _ in plain]

    def _applies(self, output: Any) -> bool:
        """Whether the layer computed in the type of the sites, for all rows alike, and nothing is dropped now."""
        return (
            getattr(output, "dtype", None) is self.type
            and self.stack.rows is None
            and not any(site.drops for site in self.of)
        )

    def _first(self, module: nn.Module) -> bool:
        """Whether no other hook saw the output before."""
        return next(iter(module._forward_hooks), None) == self.handles[0].id

    def joined(self, h: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """h with all active sites."""
        if self.stack.rows is not None:
            return self._by_rows(h, x, self.stack.rows)
        for name, weight in self.stack.active:
            h = self.changed(name, h, x, weight)
        return h

    def changed(self, name: str, h: torch.Tensor, x: torch.Tensor | None, weight: float = 1.0) -> torch.Tensor:
        """h with the sites of one adapter."""
        for site in self.sites.get(name, ()):
            h = site.forward(h, x, weight)
        return h

    def _by_rows(self, h: torch.Tensor, x: torch.Tensor | None, names: Sequence[str | None]) -> torch.Tensor:
        """Each row of the batch with its own adapter: all at once where they are low-rank, else one after the other."""
        if not torch.is_grad_enabled():
            if self.gathered is None or self.gathered.names is not names or len(self.gathered.down) != len(h):
                self.gathered = gathered(self.sites, h, names)
            if self.gathered is not None:
                source = h if x is None or self.gathered.after else x
                return torch.baddbmm(h, torch.bmm(source, self.gathered.down), self.gathered.up)
        for name in dict.fromkeys(names):
            if name is None or name not in self.sites:
                continue
            rows = self.stack.rows_of(name, len(h)).to(h.device)
            h = h.index_copy(0, rows, self.changed(name, h[rows], None if x is None else x[rows]))
        return h


class Light:
    """h + scale · up(down(x)) in as few operations as there are, h being changed in place: for decoding.

    The site's weights are looked up anew each time: where they lie in parts they are others in each call of the model.
    """

    def __init__(self, site: LowRank, scale: float):
        self.site, self.scale = site, scale
        self.up: torch.Tensor | None = None
        self.place = 0
        self.turned: torch.Tensor = site.up

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """down `[rank, inputs]` and up `[outputs, rank]`, as they are now."""
        weights = self.site._parameters  # which DeepSpeed replaces by others
        down, up = weights["down"], weights["up"]
        assert down is not None
        assert up is not None
        return down, up

    def added(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`h [rows, length, outputs]` with the change; any other shape too."""
        down, up = self.held()
        low = linear(x, down)
        if h.dim() == 3 and h.shape[0] == 1:  # one row: the product is added as it is made
            if up is not self.up or up.data_ptr() != self.place:  # the weights lie elsewhere by now
                self.up, self.place, self.turned = up, up.data_ptr(), up.detach().t()[None]
            return h.baddbmm_(low, self.turned, alpha=self.scale)
        return h.add_(linear(low, up), alpha=self.scale)


@dataclass(frozen=True)
class Gathered:
    """The low-rank weights of every row of a batch side by side: `down [rows, inputs, rank]`, `up [rows, rank, o]`."""

    names: Sequence[str | None]
    down: torch.Tensor
    up: torch.Tensor
    after: bool


def gathered(sites: Mapping[str, list[Site]], h: torch.Tensor, names: Sequence[str | None]) -> Gathered | None:
    """The weights of all rows of h `[rows, length, o]`, low ranks padded; None where a site is not plain low-rank."""
    found: dict[str, LowRank] = {}
    for name in dict.fromkeys(names):
        for site in sites.get(name, ()) if name is not None else ():
            if name in found or not isinstance(site, LowRank) or not site.plain or site.drops:
                return None
            found[str(name)] = site
    if len({site.after for site in found.values()}) != 1 or h.dim() != 3 or len(h) % len(names):
        return None
    first, rank = next(iter(found.values())), max(len(site.down) for site in found.values())
    down = h.new_zeros(len(names), first.inputs, rank)
    up = h.new_zeros(len(names), rank, h.shape[-1])
    for row, name in enumerate(names):
        if name in found:
            mine = found[name]
            down[row, :, : len(mine.down)] = mine.down.t()
            up[row, : len(mine.down)] = mine.scale * mine.up.t()
    times = len(h) // len(names)
    if times > 1:
        down, up = down.repeat_interleave(times, 0), up.repeat_interleave(times, 0)
    return Gathered(names, down, up, first.after)
