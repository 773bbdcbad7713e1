"""LoRA on fused experts as peft writes it (`target_parameters`): names and shapes of its factors, read and written.

peft wraps a module of experts once for each of its parameters, the first one innermost, and puts the factors of all
experts into two matrices: A `[experts · rank, …]`, B `[…, rank · experts]`. It takes experts for [outputs, inputs]
where their module does not say otherwise (`is_transposed`), so that A and B stand on the other sides in some models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.adapters.forms import ExpertLowRank, Site
from graft.adapters.places import Layout, sizes
from graft.errors import CheckpointError, RequestError
from graft.lora import check_linear, meant

WRAPPED = ".base_layer"
"""What peft puts behind a module's name for each wrapper around it but the outermost."""


RENAMED = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Linear layers that peft takes for experts, by their former names, where a model has fused ones: they are written as
parameters too, which it takes for what they are."""


def standing_at(model: nn.Module | None, path: str, targets: Sequence[str], folder: Path) -> tuple[str, int, str]:
    """(place, experts in it or 0, what the patterns of ranks call it) of the factors that peft calls by `path`.

    Raises RequestError for what is neither a linear layer nor a parameter of experts here, and for those where there
    is no model to tell their number.
    """
    holder = path.replace(WRAPPED, "")
    if model is None:
        check_linear(holder, targets, folder)
        return path, 0, f"{path}.weight" if meant(f"{path}.weight", targets) else path
    try:
        module = model.get_submodule(holder)
    except AttributeError:
        return path, 0, path  # told with the places that there are
    names = [name for name, _ in module.named_parameters(recurse=False) if meant(f"{holder}.{name}", targets)]
    if sizes(module) is not None or not names:
        return path, 0, f"{path}.weight" if "weight" in names else path
    depth = path.count(WRAPPED)
    name = names[max(0, len(names) - 1 - depth)]
    weight = module.get_parameter(name)
    if depth >= len(names) or weight.dim() != 3:
        raise RequestError(
            f"{folder}: expected LoRA on linear layers or on parameters [experts, …, …], found it on {holder}: load it "
            "with peft"
        )
    return f"{holder}.{name}", len(weight), f"{holder}.{name}"


def as_parameters(model: Any, sites: Sequence[Site]) -> set[str]:
    """Paths of linear layers that peft is to take as parameters; empty where the model has no fused experts.

    Raises RequestError for DoRA on them, which peft has for modules only.
    """
    mistaken = {site.place.path: site for site in sites if site.place.path.rpartition(".")[2] in RENAMED}
    if not mistaken or not Layout(model).experts():
        return set()
    if turned := next((path for path, site in mistaken.items() if site.point.directions), None):
        raise RequestError(
            f"expected LoRA without DoRA, found it with: peft has none at {turned} in a model of experts, for which it "
            "takes layers of that name; keep graft's own folder, or fold it"
        )
    return set(mistaken)


def read_factors(sites: Any, named: Mapping[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of sites at experts by their names in graft's files; those of linear layers as they are.

    `named`: peft's, by the path of the layer or parameter with `.down` (A), `.up` (B).
    """
    at_experts = {site.place.path: site for site in sites.values() if isinstance(site, ExpertLowRank)}
    found = {name: value for name, value in named.items() if name.rpartition(".")[0] not in at_experts}
    for path, site in at_experts.items():
        count = site.place.experts
        a, b = named[f"{path}.down"], named[f"{path}.up"]
        if len(a) % count or b.shape[1] != len(a):
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            raise CheckpointError(f"{folder}: expected factors of {count} experts at {path}, found {shapes}")
        a = a.view(count, -1, a.shape[1])
        b = b.view(len(b), -1, count).permute(2, 0, 1)
        found[f"{path}.down"], found[f"{path}.up"] = (a, b) if _alike(site) else (b.mT, a.mT)
    return found


def written_factors(sites: Sequence[ExpertLowRank], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of peft's file. Raises RequestError for experts that peft does not know."""
    by_module: dict[str, list[ExpertLowRank]] = {}
    for site in sites:
        by_module.setdefault(site.place.target, []).append(site)
    found = {}
    for path, here in by_module.items():
        if stacked := next((site for site in here if site.weight().dim() != 3), None):
            raise RequestError(
                f"{stacked.place.path} has the experts' rows below each other in one matrix, for which peft has no "
                "type: keep graft's own folder, or fold it"
            )
        order = list(dict(here[0].module.named_parameters(recurse=False)))
        inner_first = sorted(here, key=lambda site: order.index(site.place.parameter))
        for depth, site in enumerate(reversed(inner_first)):
            a, b = (site.down, site.up) if _alike(site) else (site.up.mT, site.down.mT)
            start = f"{prefix}{path}{WRAPPED * depth}"
            found[f"{start}.lora_A.weight"] = a.reshape(-1, a.shape[-1])
            found[f"{start}.lora_B.weight"] = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return found


def _alike(site: ExpertLowRank) -> bool:
    """Whether peft takes the same side of the parameter for inputs as the model does."""
    return bool(getattr(site.module, "is_transposed", False)) == site.place.turned
