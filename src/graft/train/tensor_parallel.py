"""Tensor parallelism: the layers of a model split by the plan that `transformers` has for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graft.errors import RequestError

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

HEADS = ("num_attention_heads", "num_key_value_heads")


def unsplittable(config: Mapping[str, Any], tensor: int) -> list[str]:
    """Why `tensor` processes cannot share the layers of the model that a configuration (as in `config.json`) names."""
    from graft.adapters.trial import skeleton

    model = skeleton(config)
    return [] if model is None else _problems(model, tensor)


def _problems(model: Any, tensor: int) -> list[str]:
    name = type(model).__name__
    if not getattr(model, "tp_plan", None):
        return [f"transformers has no plan for splitting {name} (`parallel.tensor`): use `parallel: fsdp` without it"]
    known = model.config.get_text_config()
    found = {word: getattr(known, word, None) for word in HEADS}
    uneven = [f"{word} {count}" for word, count in found.items() if isinstance(count, int) and count % tensor]
    return [f"expected heads that `parallel.tensor: {tensor}` divides, found {uneven[0]} in {name}"] if uneven else []


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the layers of `model` over `mesh` (of one dimension), in place: their weights become DTensors.

    A matrix tied to the embedding stays whole with it. Raises RequestError for a model without a plan.
    """
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    # of every gathering of a weight that is split twice, that it takes two exchanges
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    if wrong := _problems(model, mesh.size()):
        raise RequestError(wrong[0])
    plan = model._expand_parallel_plan(model.tp_plan)  # type: ignore[operator]
    apply_tensor_parallelism(model, mesh, {name: how for name, how in plan.items() if not _tied(model, name)})


def _tied(model: nn.Module, name: str) -> bool:
    """Whether `name` is a parameter that stands in several modules, or a module that has such a one."""
    places: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    shared = {n for n, p in model.named_parameters(remove_duplicate=False) if places[id(p)] > 1}
    return name in shared or any(other.rpartition(".")[0] == name for other in shared)
