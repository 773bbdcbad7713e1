"""Folding: adapters into the weights of the frozen model, which is then an ordinary one of the same shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.adapters.foreign import save_foreign_folded
from graft.adapters.forms import ExpertLowRank, Site, oriented
from graft.adapters.places import sizes
from graft.adapters.stack import NAME, Adapted, Adapters, adapters_of
from graft.errors import RequestError
from graft.models import no_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fold(model: PreTrainedModel) -> PreTrainedModel:
    """Fold the active adapters into `model`, in place, and take all adapters out: same class, shapes and names.

    Every foldable site is an affine function of the module's output h = W x + b and of x, so what it makes of the
    columns of W, and of b, is the new weight and bias; worked out in float32 and cast once.

    Raises RequestError where there is nothing to fold (it may have been folded already), and for what cannot be
    folded: non-linear forms, sublayers, learned keys and tokens, quantised or shared weights, missing biases.
    """
    stack = adapters_of(model)
    if stack is None:
        raise RequestError("expected a model with adapters to fold, found none: they are folded already, or never were")
    _check_folds(model, stack)
    changed = folded_tensors(model, stack)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in changed.items():
            parameters[name].copy_(tensor)
    remove(model)
    return model


def _check_folds(model: PreTrainedModel, stack: Adapters) -> None:
    problems = unfoldable(model, stack)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise RequestError(f"these adapters do not fold: {'; '.join(problems[:3])}{more}; keep them as an adapter")


def remove(model: PreTrainedModel) -> None:
    """Take all adapters out of `model`."""
    stack = adapters_of(model)
    if stack is None:
        return
    for junction in stack.junctions.values():
        for handle in junction.handles:
            handle.remove()
    stack.release(model)
    delattr(model, NAME)
    plain: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, Adapted))
    model.__class__ = plain


def save_folded(model: PreTrainedModel, folder: Path) -> None:
    """Write the model with its active adapters folded in, as an ordinary folder; `model` itself stays as it is.

    Raises RequestError for what cannot be folded, as `fold` does.
    """
    stack = adapters_of(model)
    if stack is None:
        save_foreign_folded(model, folder)
        return
    _check_folds(model, stack)
    held = model.state_dict(keep_vars=True)
    whole = {name: value.detach() for name, value in held.items() if not name.startswith(f"{NAME}.")}
    for changed, tensor in folded_tensors(model, stack).items():
        whole.update({name: tensor for name in whole if held[name] is held[changed]})  # shared ones have several names
    with no_bars():
        super(Adapted, model).save_pretrained(folder, state_dict=whole)  # type: ignore[misc]
    if getattr(model, "can_generate", lambda: False)():
        model.generation_config.save_pretrained(folder)


def unfoldable(model: PreTrainedModel, stack: Adapters) -> list[str]:
    """Why the active adapters cannot be folded, a sentence for each place; empty where they can."""
    shared = _shared(model)
    found = [f"{name} has learned keys or tokens, which are no weights of the model" for name in stack.keyed()]
    for inside, _ in _at_experts(stack):
        if id(inside.weight()) in shared:
            found.append(f"{inside.place.path} shares its weight with another module")
    for path, sites in _by_module(stack).items():
        module = sites[0][0].module
        weight = getattr(module, "weight", None)
        for site, _ in sites:
            if not site.affine:
                found.append(f"{path} has a {site.point.form}, which is not linear")
            elif not site.place.single and not site.place.before:
                found.append(f"{path} reads what another module reads ({site.place.source})")
        if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATS:
            found.append(f"{path} is quantised: load its base without quantisation first")
        elif id(weight) in shared and any(site.point.form != "bias" for site, _ in sites):
            found.append(f"{path} shares its weight with another module")
        if getattr(module, "bias", None) is None and any(_needs_bias(site) for site, _ in sites):
            found.append(f"{path} has no bias to fold into")
    return list(dict.fromkeys(found))


def _needs_bias(site: Site) -> bool:
    return site.point.form == "bias"


def _shared(model: nn.Module) -> set[int]:
    seen: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {place for place, count in seen.items() if count > 1}


def _by_module(stack: Adapters) -> dict[str, list[tuple[Site, float]]]:
    """Sites of the active adapters with their weights, in the order they run, by the path of the module."""
    found: dict[str, list[tuple[Site, float]]] = {}
    # what changes a module's input comes before what changes its output
    for before in (True, False):
        for name, weight in stack.active:
            for junction in stack.junctions.values():
                for site in junction.sites.get(name, ()):
                    if site.place.before == before and not isinstance(site, ExpertLowRank):
                        found.setdefault(site.place.target, []).append((site, weight))
    return found


def _at_experts(stack: Adapters) -> Iterator[tuple[ExpertLowRank, float]]:
    """The sites at fused experts of the active adapters, with their weights."""
    for name, weight in stack.active:
        for junction in stack.junctions.values():
            for site in junction.sites.get(name, ()):
                if isinstance(site, ExpertLowRank):
                    yield site, weight


@torch.no_grad()
def folded_tensors(model: PreTrainedModel, stack: Adapters) -> dict[str, torch.Tensor]:
    """The weights and biases that folding changes, by name, in the dtype and shape they have in the model."""
    training = stack.training
    stack.eval()
    by_module = _by_module(stack).items()
    changed = {name: tensor for path, sites in by_module for name, tensor in _folded_module(path, sites)}
    at_experts: dict[str, list[tuple[ExpertLowRank, float]]] = {}
    for site, weight in _at_experts(stack):
        at_experts.setdefault(site.place.path, []).append((site, weight))
    for path, parts in at_experts.items():
        whole = parts[0][0].weight()
        for part, times in parts:
            whole = part.folded(whole, times)
        changed[path] = whole.to(parts[0][0].weight().dtype)
    stack.train(training)
    return changed


def _folded_module(path: str, sites: list[tuple[Site, float]]) -> Iterator[tuple[str, torch.Tensor]]:
    module = sites[0][0].module
    old_bias = getattr(module, "bias", None)
    if sizes(module) is None:  # a norm: what it gives may be shifted, and its channels multiplied
        gain: torch.Tensor = module.weight  # type: ignore[assignment]
        rows = torch.stack([torch.zeros_like(gain), gain, old_bias]).float()  # type: ignore[list-item]
        nothing, multiplied, bias = _through(sites, rows, None)
        yield f"{path}.weight", (multiplied - nothing).to(gain.dtype)
        yield f"{path}.bias", bias.to(old_bias.dtype)  # type: ignore[union-attr]
        return
    plain = oriented(module).float().t()  # row i is what the module makes of the i-th unit vector
    before, outside = ([pair for pair in sites if pair[0].place.before == first] for first in (True, False))
    units = _through(before, torch.eye(len(plain), device=plain.device), None)
    nothing = _through(before, torch.zeros(1, len(plain), device=plain.device), None)
    zero = _through(outside, nothing @ plain, nothing)
    weight_t = _through(outside, units @ plain, units) - zero
    if old_bias is not None:
        yield f"{path}.bias", _through(outside, nothing @ plain + old_bias.float(), nothing)[0].to(old_bias.dtype)
    stored = module.weight
    assert isinstance(stored, torch.Tensor)
    turned = weight_t if type(module).__name__ == "Conv1D" else weight_t.t()
    yield f"{path}.weight", turned.to(stored.dtype).contiguous()


def _through(sites: list[tuple[Site, float]], h: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
    for site, weight in sites:
        h = site(h, x, weight)
    return h
