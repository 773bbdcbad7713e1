"""Heads on disk: `heads/TASK` in a model's folder is a model's folder too.

It holds `config.json` (of the class with that head, labels included), `head.safetensors` (the weights that only this
head has) and an index that names for the weights of the body the files of the model's folder. So
`AutoModelForSequenceClassification.from_pretrained("multi/heads/topic")` and its like load it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.checkpoint import INDEX, read_headers, weight_files
from graft.disk import atomic_write, disk_errors
from graft.errors import CheckpointError, RequestError, UnknownName
from graft.folders import head_kind, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HEADS = "heads"
OWN = "head.safetensors"
TASK = "graft_task"
"""What `config.json` says of the task: its `name`, the `kind` of its head and its `data`."""


@dataclass(frozen=True)
class HeadFacts:
    """A head on disk: the folder that loads as a model, its kind, its task's name and data, and its labels in order."""

    folder: Path
    kind: str
    task: str
    data: str | None
    labels: tuple[str, ...]


def heads_in(folder: Path) -> dict[str, HeadFacts]:
    """The heads of a model's folder by the names of their tasks; of a plain model with a head itself, that one."""
    folder = Path(folder)
    own = _head_of(folder, folder.name)
    if own is not None:
        return {own.task: own}
    found = (_head_of(place, place.name) for place in sorted((folder / HEADS).glob("*")) if place.is_dir())
    return {head.task: head for head in found if head is not None}


def _head_of(folder: Path, name: str) -> HeadFacts | None:
    if not (folder / "config.json").is_file():
        return None
    config = read_config(folder)
    kind = head_kind(config)
    if kind is None:
        return None
    said = config.get(TASK) or {}
    labels = config.get("id2label") or {}
    ordered = tuple(str(labels[number]) for number in sorted(labels, key=int)) if kind != "spans" else ()
    return HeadFacts(folder, kind, said.get("name", name), said.get("data"), ordered)


def head_in(folder: Path) -> HeadFacts | None:
    """The head that a folder is; None where its model has one over the vocabulary."""
    return _head_of(Path(folder), Path(folder).name)


def load_own(model: PreTrainedModel, folder: Path) -> None:
    """Take the weights of a head's folder beside those of its body. Raises CheckpointError if they do not fit."""
    from safetensors.torch import load_file

    body = f"{model.base_model_prefix}."
    if (folder / OWN).is_file():  # beside what stands on the body, parts of it that only heads need, such as a pooler
        own = load_file(folder / OWN)
    else:
        held = {n: t for path in weight_files(folder) for n, t in load_file(path).items()}
        own = {name: tensor for name, tensor in held.items() if not name.startswith(body)}
    wanted = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(body)}
    if {name: tensor.shape for name, tensor in own.items() if name in wanted} != wanted:
        raise CheckpointError(f"{folder}: expected the weights {', '.join(wanted)} of a head, found {', '.join(own)}")
    model.load_state_dict(own, strict=False)


def find_head(folder: Path, kind: str | None = None, task: str | None = None, data: str | None = None) -> HeadFacts:
    """The head of a kind in a model's folder: by its task's name, by the data it learned from, or the only one.

    Raises UnknownName for a task that has none, RequestError where none or several would do.
    """
    heads = heads_in(folder)
    if task is not None and task not in heads:
        raise UnknownName(f"head of {folder}", task, heads)
    fitting = [h for h in heads.values() if kind in (None, h.kind) and task in (None, h.task)]
    named = [head for head in fitting if data is not None and head.data == data]
    if len(named) == 1 or len(fitting) == 1:
        return (named if len(named) == 1 else fitting)[0]
    there = ", ".join(f"{head.task} ({head.kind})" for head in heads.values()) or "none"
    what = f"head for {kind}" if kind else "head"
    raise RequestError(f"{folder}: expected one {what}, found {there}: say which with `head: TASK`")


def split_files(folder: Path, prefix: str) -> None:
    """Write the files of a model's folder anew: tensors below `prefix` (the body) and the others in files apart."""
    from safetensors.torch import load_file, save_file

    where: dict[str, str] = {}
    size = 0
    for path in weight_files(folder):
        tensors = load_file(path)
        size += path.stat().st_size
        parts: dict[str, dict[str, Any]] = {"body": {}, "rest": {}}
        for name, tensor in tensors.items():
            parts["body" if name.startswith(f"{prefix}.") else "rest"][name] = tensor
        for part, held in parts.items():
            if held:
                file = f"{path.stem}.{part}.safetensors"
                save_file(held, folder / file, metadata={"format": "pt"})
                where.update(dict.fromkeys(held, file))
        path.unlink()
    atomic_write(folder / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1) + "\n")


def save_heads(
    heads: Mapping[str, PreTrainedModel],
    facts: Mapping[str, dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    prefix: str,
) -> None:
    """Write the heads into `folder`, where the model stands already whose body (below `prefix` there) they share.

    `facts[task]` goes into the head's configuration. The model's files are split so that a head reads those of the body
    alone: two files that it reads never hold one name.
    """
    with disk_errors(folder):
        split_files(folder, prefix)
    files = {name: header.file.name for name, header in read_headers(folder).items()}
    written = {name: file for name, file in files.items() if name.startswith(f"{prefix}.")}
    for task, model in heads.items():
        place = folder / HEADS / task
        place.mkdir(parents=True, exist_ok=True)
        with disk_errors(place):
            _save_head(model, facts[task], place, written)
            tokenizer.save_pretrained(place)


def _save_head(model: PreTrainedModel, facts: dict[str, Any], place: Path, written: dict[str, str]) -> None:
    from safetensors.torch import save_file

    held = {name: value for name, value in model.state_dict().items() if "graft_adapters" not in name}
    own = {name: value.detach().cpu().contiguous() for name, value in held.items() if name not in written}
    save_file(own, place / OWN, metadata={"format": "pt"})
    where = {name: OWN if name in own else f"../../{written[name]}" for name in held}
    size = sum(value.numel() * value.element_size() for value in held.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    atomic_write(place / INDEX, json.dumps(index, indent=1) + "\n")
    model.config.architectures = [type(model).__name__]
    setattr(model.config, TASK, facts)
    model.config.save_pretrained(place)
