"""Where sites meet fused experts: while their module runs, its parameters are weights that know the sites' changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graft.adapters.expert_weight import Part, check_undropped, summed, with_change
from graft.adapters.forms import ExpertLowRank
from graft.adapters.places import Place
from graft.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.adapters.stack import Adapters

BY_PRODUCTS = (None, "eager", "batched_mm", "grouped_mm")
"""The ways of `transformers` to compute experts that take products of their parameters by PyTorch's own functions.

Other kernels would read the bare weight from memory: they are given the sum."""


class ExpertJunction:
    """Where sites meet the parameters of one module of experts.

    A parameter that is looked up while the module runs is found in the module's own `__dict__`, in front of the frozen
    one, which stays where it is; behind the run it is gone again, also where the run is broken off.
    """

    gathered = None
    """Rows are mixed before experts see them: there is nothing to gather."""

    def __init__(self, stack: Adapters, model: PreTrainedModel, place: Place):
        self.stack, self.place = stack, place
        self.sites: dict[str, list[ExpertLowRank]] = {}
        target = model.get_submodule(place.target)
        self.handles = [
            target.register_forward_pre_hook(self.enter),
            target.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: Sequence[Any]) -> None:
        """Put weights with changes in front of the frozen ones."""
        self.leave(module)
        said = getattr(getattr(module, "config", None), "_experts_implementation", None)
        for parameter, parts in self.parts().items():
            owner, name = _owner(module, parameter)
            weight = owner._parameters[name]
            assert weight is not None
            if hasattr(weight, "ds_id") and not weight.numel():
                raise RequestError(
                    f"{parameter} of {type(module).__name__} lies in parts that DeepSpeed puts together too late for "
                    "an adapter on it: use `parallel: fsdp`, or stage 1 or 2"
                )
            owner.__dict__[name] = with_change(weight, parts) if said in BY_PRODUCTS else _whole(weight, parts, said)

    def parts(self) -> dict[str, list[Part]]:
        """What the active adapters change, by the parameter."""
        found: dict[str, list[Part]] = {}
        for name, weight in self.stack.active:
            for site in self.sites.get(name, ()):
                found.setdefault(site.place.parameter, []).append(site.part(weight))
        return found

    def leave(self, module: nn.Module, *about: Any) -> None:
        """Let the frozen ones be seen again."""
        for parameter in self._parameters():
            owner, name = _owner(module, parameter)
            owner.__dict__.pop(name, None)

    def _parameters(self) -> Iterator[str]:
        yield from dict.fromkeys(site.place.parameter for sites in self.sites.values() for site in sites)


def check_by_rows(name: str, junctions: Iterable[Any]) -> None:
    """Raises RequestError for an adapter on experts, fused or single, which read tokens of all rows together."""
    for one in junctions:
        fused = isinstance(one, ExpertJunction)
        if name in one.sites and (fused or ".experts." in one.place.target):
            which = "fused experts, which read" if fused else "an expert, which reads"
            raise RequestError(
                f"{name} changes {one.place.target}, {which} tokens of all rows together: expected adapters that know "
                "a token's row; put them beside whole layers (feed_forward, attention_linears), or read the rows of "
                "one adapter at a time (`use`)"
            )


def uncompilable(junctions: Iterable[Any]) -> list[str]:
    """Why a model with sites at these cannot be compiled, in a sentence; empty where it can."""
    found = [one.place.target for one in junctions if isinstance(one, ExpertJunction) and one.sites]
    if not found:
        return []
    return [f"`compile` does not follow adapters on fused experts, found them at {found[0]}: leave it out"]


def _owner(module: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return module.get_submodule(path), name


def _whole(weight: Tensor, parts: Sequence[Part], how: str) -> Tensor:
    check_undropped(parts, how)
    return summed(weight, parts)
