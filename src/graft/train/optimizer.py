"""AdamW as everybody uses it: fused, weight decay on matrices only; its moments also in 8 bits or paged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from graft.errors import RequestError, TrainingError
from graft.train import eight_bits
from graft.train.settings import TrainSettings

CLASSES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
"""The setting `optimizer` → the class of bitsandbytes."""


def adamw(
    model: nn.Module, settings: TrainSettings, parts: Mapping[nn.Parameter, nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the parameters that require a gradient.

    Biases, norms (everything with fewer than two dimensions) and embeddings get no weight decay; a matrix tied to an
    embedding is that embedding. A parameter with an attribute `rate` learns that many times as fast. `parts`: what of
    each this process holds, if not all. Raises TrainingError where every parameter is frozen, RequestError where the
    device has no such optimizer.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("expected parameters to train, found all of them frozen; freeze fewer")
    groups, device = _groups(model, trained, settings.weight_decay, parts or {p: p for p in trained}), trained[0].device
    if settings.optimizer != "adamw":
        check_optimizer(settings.optimizer, device)
        return _class(settings.optimizer)(groups, lr=settings.learning_rate, betas=settings.betas)
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in trained)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=fused)


def _groups(
    model: nn.Module, trained: list[nn.Parameter], decay: float, parts: Mapping[nn.Parameter, nn.Parameter]
) -> list[dict[str, Any]]:
    """The parts of parameters by their rate and whether they decay."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = []
    for rate in dict.fromkeys(getattr(p, "rate", 1.0) for p in trained):
        alike = [p for p in trained if getattr(p, "rate", 1.0) == rate]
        decayed = [p for p in alike if p.ndim >= 2 and id(p) not in embeddings]
        plain = [p for p in alike if p.ndim < 2 or id(p) in embeddings]
        groups.append({"params": [parts[p] for p in decayed], "weight_decay": decay, "rate": rate})
        groups.append({"params": [parts[p] for p in plain], "weight_decay": 0.0, "rate": rate})
    return [group for group in groups if group["params"]]


def _class(name: str) -> Any:
    import bitsandbytes

    return getattr(bitsandbytes.optim, CLASSES[name])


def check_optimizer(name: str, device: torch.device | str | None) -> None:
    """Raises RequestError where `device` (None: the accelerator, or the CPU) has no such optimizer.

    It is found out by a step on a few numbers.
    """
    if name == "adamw":
        return
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(device or found or "cpu")
    if name.startswith("paged") and device.type == "cpu":
        raise RequestError(
            f"expected a CUDA device for the optimizer {name}, whose moments give way to the computer's memory, found "
            f"the CPU: use `optimizer: {'adamw_8bit' if name.endswith('8bit') else 'adamw'}`"
        )
    tried = nn.Parameter(torch.zeros(4096, device=device))  # as few as are held in 8 bits
    tried.grad = torch.zeros_like(tried)
    try:
        _class(name)([tried], lr=0.0).step()
    except (RuntimeError, NotImplementedError, ValueError, AttributeError, KeyError) as error:
        why = str(error).strip().splitlines()[:1]
        raise RequestError(
            f"the optimizer {name} does not run on {device.type} with the bitsandbytes that is installed "
            f"({type(error).__name__}: {''.join(why)}): use `optimizer: adamw`"
        ) from None


def moments(optimizer: torch.optim.Optimizer, *, in_parts: bool = False) -> dict[str, torch.Tensor]:
    """All of its state that changes, by `NUMBER.NAME`: the parameter's number, as in `state_dict`, and what it is.

    `in_parts`: parameters are parts of larger ones, so that moments of 8 bits are given as numbers.
    """
    found = {}
    for number, (_, _, p) in enumerate(_parameters(optimizer)):
        state = optimizer.state.get(p, {})
        state = eight_bits.spread(state) if in_parts and "state1" in state else state
        for name, value in state.items():
            if name not in eight_bits.TABLES.values():  # which never change
                found[f"{number}.{name}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return found


def set_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `moments` gave."""
    held: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        held.setdefault(int(number), {})[name] = tensor
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})
        return
    # its own loading would take paged moments into the device's memory
    for count, (group, place, p) in enumerate(_parameters(optimizer)):
        if count in held:
            optimizer.init_state(optimizer.param_groups[group], p, group, place)  # type: ignore[attr-defined]
            _put(optimizer.state[p], held[count])


def _put(state: dict[str, Any], held: Mapping[str, torch.Tensor]) -> None:
    eight_bits.put(state, held)
    for name in (name for name in state if name in held and name not in eight_bits.NAMES):
        if isinstance(state[name], torch.Tensor):
            state[name].copy_(held[name])
        else:
            state[name] = int(held[name])


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, int, nn.Parameter]]:
    """(group, place in it, parameter), in order."""
    for number, group in enumerate(optimizer.param_groups):
        yield from ((number, place, p) for place, p in enumerate(group["params"]))
