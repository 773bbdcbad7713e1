"""Heads beside adapters that lie apart: `heads/TASK` in an adapter's folder is a model's folder too.

It holds `config.json` (of the class with that head, which names the adapter's folder two folders up) and
`head.safetensors` (the weights that only this head has). The frozen model's weights are in neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.adapters.facts import HEAD_OF, adapter_of_head
from graft.adapters.foreign import tasks_of
from graft.adapters.stack import Adapted, carried
from graft.checkpoint import read_file_headers, read_headers
from graft.disk import atomic_write, disk_errors
from graft.errors import CheckpointError
from graft.finite import check_tensors
from graft.folders import ADAPTED, head_kind, read_config
from graft.lora import base_folder, is_lora
from graft.multitask.build import add_head
from graft.multitask.folder import HEADS, OWN, TASK, head_in

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def save_adapted_heads(
    heads: Mapping[str, PreTrainedModel],
    facts: Mapping[str, dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast | None,
    folder: Path,
    base: Path,
) -> None:
    """Write heads into the folder of the adapter that they stand on; `base` is where the frozen model lies.

    `facts[task]` goes into the head's configuration.
    """
    from safetensors.torch import save_file

    for task, model in heads.items():
        place = folder / HEADS / task
        place.mkdir(parents=True, exist_ok=True)
        kind = {"format": 1, "model_type": model.config.model_type, HEAD_OF: "../.."}
        said = {"model_type": ADAPTED, ADAPTED: kind, "architectures": [type(model).__name__], TASK: facts[task]}
        with disk_errors(place):
            held = {name: value.detach().cpu().contiguous() for name, value in own_weights(model, base).items()}
            save_file(held, place / OWN, metadata={"format": "pt"})
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
        config = {**model.config.to_dict(), **said}
        atomic_write(place / "config.json", json.dumps(config, indent=2, default=str) + "\n")


def own_weights(model: PreTrainedModel, base: Path) -> dict[str, Tensor]:
    """What only a head has: its weights beside the body, and parts of the body that the frozen model does without."""
    import torch

    prefix = f"{model.base_model_prefix}."
    known = {name.removeprefix(prefix).split(".")[0] for name in read_headers(_plain(base))}
    plain: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, Adapted))
    with torch.device("meta"):  # other heads may have brought parts into the body that they share
        needed = plain._from_config(model.config).state_dict()
    own = {name for name in needed if not name.startswith(prefix)}
    own |= {name for name in set(needed) - own if name.removeprefix(prefix).split(".")[0] not in known}
    return {name: value for name, value in model.state_dict().items() if name in own}


def load_head(folder: Path, *, dtype: Any = None, device: str | None = None) -> PreTrainedModel:
    """The model of a head's folder beside an adapter: frozen model, adapter and head, in evaluation mode.

    An adapter that mixes by tasks is told the head's.

    Raises CheckpointError for weights of the head that are damaged, missing or of other shapes.
    """
    from graft import models

    place = adapter_of_head(folder)
    assert place is not None
    root = models.load(place, dtype=dtype, device=device)
    if (tasks := tasks_of(root)) is not None and (own := head_in(folder)) is not None and own.task in tasks.names:
        tasks.use(own.task)
    return carried(root, filled_head(root, folder)).requires_grad_(False).eval()


def filled_head(root: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The head in `folder` on the body of `root`, a model with the adapters that it was trained beside.

    Raises CheckpointError as `load_head` does.
    """
    from safetensors.torch import load_file

    from graft import models

    found, place = head_in(folder), adapter_of_head(folder)
    if found is None or place is None:
        raise CheckpointError(f"{folder}: expected a head beside an adapter, found config.json damaged")
    made = add_head(root, found.kind, found.labels, models.load_tokenizer(folder if _speaks(folder) else place))
    for child in (child for child in made.children() if child is not root.base_model):
        child.to(root.dtype)
    read_file_headers(folder / OWN)
    held = load_file(folder / OWN)
    check_tensors(held, folder / OWN)
    _fill(made, held, folder)
    setattr(made.config, TASK, read_config(folder).get(TASK))
    return made


def _fill(head: PreTrainedModel, held: Mapping[str, Tensor], folder: Path) -> None:
    """Put weights into a head. Raises CheckpointError where some are missing, or of other shapes."""
    state = {name: value.shape for name, value in head.state_dict().items()}
    wanted = {name: shape for name, shape in state.items() if not name.startswith(f"{head.base_model_prefix}.")}
    found = {name: value.shape for name, value in held.items()}
    if not wanted.items() <= found.items() or not found.items() <= state.items():
        told = [", ".join(f"{name} {list(shape)}" for name, shape in each.items()) for each in (wanted, found)]
        raise CheckpointError(f"{folder}: expected the weights of a head ({told[0]}), found {told[1] or 'none'}")
    head.load_state_dict(held, strict=False)


def _speaks(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def is_added(model: PreTrainedModel, base: Path) -> bool:
    """Whether a model with adapters is a head beside them, rather than of the frozen model's own class."""
    name = type(model).__name__
    if head_kind({"architectures": [name]}) is None:
        return False
    return name not in read_config(_plain(base)).get("architectures", [name])


def _plain(base: Path) -> Path:
    """Where the frozen weights lie: the base itself, or what it changes where it is in the form of peft."""
    return base_folder(base) or base if is_lora(base) else base
