"""One LoRA adapter out of its folder, graft's or peft's, into a model: an expert of a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graft import lineage
from graft.adapters.facts import check_base, entry_of
from graft.adapters.folder import fill, weights_in
from graft.adapters.peft_format import adopt_peft
from graft.adapters.point import Point
from graft.adapters.sites import Sites
from graft.adapters.stack import adopt
from graft.checkpoint import ADAPTER
from graft.errors import CheckpointError, RequestError
from graft.folders import ADAPTED, read_config
from graft.lora import is_lora, named_base
from graft.settings import parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_expert(model: PreTrainedModel, folder: Path, name: str, base: Path | None) -> None:
    """Put the one adapter in `folder`, graft's or peft's LoRA, into `model` (in place) as `name`, frozen.

    `base`: the model's folder. Raises RequestError where it is no such adapter, CheckpointError where it was made for
    another model.
    """
    if is_lora(folder):
        _, place = named_base(folder)
        if base is not None and place is not None and lineage.known_hash(place) != lineage.known_hash(base):
            raise CheckpointError(f"{folder}: the expert {name} was made for another base ({place}), found {base}")
        adopt_peft(model, folder, name, base=base)
        return
    if not (folder / "config.json").is_file() or ADAPTED not in read_config(folder):
        raise RequestError(f"expected the folder of a LoRA adapter as the expert {name}, found none at {folder}")
    entry = entry_of(folder)
    if base is not None:
        check_base(folder, entry, base)
    points = entry["adapters"]
    (old, *others) = points or [""]
    if others or not old or entry["active"] != [[old, 1.0]]:
        found = "one of peft's own types" if "peft" in entry else ", ".join(f"{w:g} × {n}" for n, w in entry["active"])
        raise RequestError(f"{folder}: expected one LoRA adapter as the expert {name}, found {found or 'none'}")
    stack = adopt(model, [parse(Point, one, (old,)) for one in points[old]], name, base=base)
    alone = Sites()
    alone[old] = stack.sites[name]
    fill(alone, weights_in(folder), folder / ADAPTER)
    model.requires_grad_(False)
