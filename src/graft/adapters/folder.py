"""Adapters on disk: a small folder that names the frozen model relatively, with its hash.

`config.json` is the frozen model's, of type `graft_adapted`, with what the adapters are; `adapter.safetensors` holds
their weights. Wherever a model's folder is taken, such a folder is a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from graft import lineage, models
from graft.adapters.facts import check_base, entry_of
from graft.adapters.foreign import foreign_base, foreign_said, foreign_weights, load_foreign
from graft.adapters.point import Point
from graft.adapters.sites import Sites
from graft.adapters.stack import Adapters, adapters_of, adopt, free_name
from graft.checkpoint import ADAPTER, read_file_headers
from graft.data.objectives import is_prefix_lm
from graft.disk import atomic_write, disk_errors
from graft.errors import CheckpointError, RequestError
from graft.finite import check_tensors
from graft.folders import ADAPTED, read_config
from graft.prefix_lm import mark
from graft.settings import parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_of(model: PreTrainedModel) -> Path | None:
    """The folder of the frozen model below the adapters of `model`; None where it lies in none."""
    stack = adapters_of(model)
    return stack.base if stack is not None else foreign_base(model)


def save(model: PreTrainedModel, folder: Path, *, seen_from: Path | None = None) -> None:
    """Write the adapters of `model` into `folder`; `seen_from` is where that will stand, if elsewhere.

    Raises RequestError where the frozen model lies in no folder.
    """
    stack, base = adapters_of(model), base_of(model)
    if base is None:
        raise RequestError(
            "expected a frozen model that was loaded from a folder, found one in memory: save it first and say where "
            "(adopt(…, base=FOLDER)), or fold the adapters into it"
        )
    entry = {
        "format": 1,
        "model_type": model.config.model_type,
        "base": {
            "path": os.path.relpath(base.resolve(), Path(seen_from or folder).resolve()),
            "hash": lineage.known_hash(base),
        },
        **(_said(stack) if stack is not None else foreign_said(model)),
    }
    from graft.multitask.adapted import is_added, save_adapted_heads

    added = is_added(model, base)
    own = read_config(base) if added else {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config = {**own, "model_type": ADAPTED, ADAPTED: entry}
    config.pop("_name_or_path", None)  # where it lay on this machine; the entry says it relatively
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder):
        held = weights_of(stack) if stack is not None else foreign_weights(model)
        save_file(held, folder / ADAPTER, metadata={"format": "pt"})
        if getattr(model, "can_generate", lambda: False)():
            model.generation_config.save_pretrained(folder)
    atomic_write(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")
    if added:
        facts = model.config.graft_task
        save_adapted_heads({facts["name"]: model}, {facts["name"]: facts}, None, folder, base)


def _said(stack: Adapters) -> dict[str, Any]:
    return {
        "adapters": {name: [point.plain() for point in points] for name, points in stack.points.items()},
        "active": [list(pair) for pair in stack.active],
    }


def weights_of(stack: Adapters) -> dict[str, torch.Tensor]:
    """All weights of the adapters by the names they have in files: `NAME.PATH.TENSOR`."""
    found = dict(stack.sites.state_dict())
    for name, sites in stack.sites.items():
        for path, site in sites.items():
            if hasattr(site, "settled"):  # made by a module that is needed in training only
                start = f"{name}.{path}."
                found = {key: value for key, value in found.items() if not key.startswith(start)}
                found |= {start + part: value for part, value in site.settled().items()}
    return {key.replace("/", "."): value.detach().cpu().contiguous().clone() for key, value in found.items()}


def load(
    folder: str | Path,
    *,
    dtype: Any = None,
    device: str | None = None,
    base: str | Path | None = None,
) -> PreTrainedModel:
    """The frozen model with the adapters of `folder`, in evaluation mode, nothing trainable.

    `base` is where the frozen model lies, if not where the folder says. Raises CheckpointError where it is missing or
    another one than the adapters were made for, and for adapter weights that are damaged, missing or of other shapes.
    """
    folder = Path(folder)
    entry = entry_of(folder)
    place = Path(base) if base is not None else folder / entry["base"]["path"]
    check_base(folder, entry, place)
    return put_on(models.load(place, dtype=dtype, device=device), folder, place)


def put_on(model: PreTrainedModel, folder: Path, base: Path) -> PreTrainedModel:
    """`model`, the frozen one of the adapters in `folder`, with these as they are active there; it lies in `base`.

    Raises CheckpointError for adapter weights that are damaged, missing or of other shapes.
    """
    entry = entry_of(folder)
    mark(model, is_prefix_lm(read_config(folder)))
    if "peft" in entry:
        return load_foreign(model, entry, weights_in(folder), base).eval()
    active = _put(model, folder, entry, base)
    stack = adapters_of(model)
    assert stack is not None
    stack.use(dict(active))
    return model.eval()


def add_from(model: PreTrainedModel, folder: str | Path) -> list[tuple[str, float]]:
    """Put the adapters of `folder` beside those of `model` (in place), frozen; returns those that were active there.

    What is active in `model` stays; where a name is taken, a number is put behind the newcomer's. Raises
    CheckpointError where they were made for another frozen model.
    """
    folder, entry, stack = Path(folder), entry_of(Path(folder)), adapters_of(model)
    if stack is None or stack.base is None or "peft" in entry:
        raise RequestError(
            f"{folder}: adapters made by peft's own types stand alone: expected graft's points, found one"
        )
    check_base(folder, entry, stack.base)
    before = list(stack.active)
    active = _put(model, folder, entry, stack.base)
    stack.use(dict(before))
    return active


def _put(model: PreTrainedModel, folder: Path, entry: Mapping[str, Any], base: Path) -> list[tuple[str, float]]:
    there = adapters_of(model)
    names: dict[str, str] = {}
    # a fusion comes after those that it is of, whatever order the file has them in
    for old, raw in sorted(entry["adapters"].items(), key=lambda item: any(point.get("of") for point in item[1])):
        names[old] = free_name(old, there.points if there else ())
        points = [parse(Point, one, (old,)) for one in raw]
        adopt(model, [p.model_copy(update={"of": [names[o] for o in p.of]}) for p in points], names[old], base=base)
        there = adapters_of(model)
    assert there is not None
    added = Sites()
    for old, new in names.items():
        added[old] = there.sites[new]
    fill(added, weights_in(folder), folder / ADAPTER)
    model.requires_grad_(False)
    return [(names[name], float(weight)) for name, weight in entry["active"]]


@torch.no_grad()
def averaged(model: PreTrainedModel, weights: Mapping[str, float], name: str) -> None:
    """Replace the adapters of `model` by one, called `name`, with the weighted mean of their weights, tensor by tensor.

    Raises RequestError where they are different points of the design space.
    """
    stack = adapters_of(model)
    assert stack is not None
    first = next(iter(weights))
    different = [other for other in weights if stack.points[other] != stack.points[first]]
    if different:
        raise RequestError(
            f"expected adapters of one kind and size to average, found that {different[0]} and {first} differ: use "
            "`how: stack`, which adds their changes"
        )
    states = {other: stack.sites[other].state_dict() for other in weights}
    total = sum(weights.values())
    mean = {key: sum(w * states[o][key].float() for o, w in weights.items()) / total for key in states[first]}
    points = stack.points[first]
    for other in reversed(list(stack.points)):
        stack.drop(other)
    adopt(model, points, name)
    stack.sites[name].load_state_dict(mean)
    stack.use(name)
    model.requires_grad_(False)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the adapters in a folder. Raises CheckpointError where they are missing or damaged."""
    path = folder / ADAPTER
    if not path.is_file():
        raise CheckpointError(f"{folder}: expected the adapters' weights in {ADAPTER}, found no such file")
    read_file_headers(path)
    found = load_file(path)
    check_tensors(found, path)
    return found


@torch.no_grad()
def fill(sites: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put weights, by their names in the file `path`, into sites.

    Raises CheckpointError naming those that are missing, of another shape, or there for nothing.
    """
    targets = {key.replace("/", "."): value for key, value in sites.state_dict(keep_vars=True).items()}
    missing = sorted(set(targets) - set(weights))
    surplus = sorted(set(weights) - set(targets))
    if missing or surplus:
        what = f"missing {_some(missing)}" if missing else f"{_some(surplus)}, which belong nowhere"
        raise CheckpointError(f"{path}: expected {len(targets)} tensors, found {what}")
    for name, target in targets.items():
        if target.shape != weights[name].shape:
            found, expected = list(weights[name].shape), list(target.shape)
            raise CheckpointError(f"{path}: expected {name} of shape {expected}, found {found}")
        target.copy_(weights[name])


def _some(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
