"""Weights in PyTorch's pickles: recognised without being opened, and converted to safetensors where that is allowed.

A pickle is a program. `torch.load(weights_only=True)` runs none of it but what makes tensors and plain containers.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graft.checkpoint import INDEX, LORA, SINGLE, TORCH_NAMES, TensorWriter
from graft.disk import atomic_folder
from graft.errors import CheckpointError
from graft.lora import base_folder, is_lora, name_base

if TYPE_CHECKING:
    from torch import Tensor

ONE, LISTED = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_model.bin"
"""Where older versions of peft keep the factors of an adapter."""
LEFT = ("*.bin", "*.pt", "*.pth", "*.ckpt", LISTED, "graft.json", "checkpoints", ".*")
"""What of a folder does not go into the converted one."""
PIECE = 1 << 24


def is_pickled(folder: Path | str) -> bool:
    """Whether a model's weights, or an adapter's, lie in pickles and nowhere else."""
    place = Path(folder)
    if any((place / name).is_file() for name in (SINGLE, INDEX)):
        return False
    if is_lora(place):
        return (place / ADAPTER).is_file() and not (place / LORA).is_file()
    return (place / ONE).is_file() or (place / LISTED).is_file()


def refusal(names: Sequence[str]) -> str:
    """What is said of models whose weights lie in pickles where nobody has allowed to read them."""
    are = "is stored as a pickle" if len(names) == 1 else "are stored as pickles"
    return (
        f"{', '.join(names)} {are}, which may hold a program: `allow_pickle: true` (--allow-pickle) reads tensors from "
        "it and refuses all else; or get the model as safetensors"
    )


def pickled_files(folder: Path) -> list[Path]:
    """The pickles of a model or an adapter. Raises CheckpointError for missing shards and for a damaged index."""
    if is_lora(folder):
        return [folder / ADAPTER]
    if not (folder / LISTED).is_file():
        return [folder / ONE]
    try:
        names = sorted(set(json.loads((folder / LISTED).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / LISTED}: expected an index, found a damaged file ({error})") from None
    if wrong := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{folder / LISTED}: expected file names beside it, found {wrong[0]!r}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: missing {len(missing)} of {len(names)} shards: {', '.join(missing)}")
    return [folder / name for name in names]


def hash_pickles(folder: Path) -> str:
    """sha256 of the files' bytes: nothing is opened."""
    whole = hashlib.sha256()
    for path in pickled_files(Path(folder)):
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def pickled_bytes(folder: Path) -> int:
    """Size of the files."""
    return sum(path.stat().st_size for path in pickled_files(Path(folder)))


def converted(folder: Path, cache: Path, tied: Mapping[str, str]) -> Path:
    """A folder in `cache` with the same model in safetensors, made once for these bytes.

    `tied` are names that the model has for a tensor it stores under another one. Raises CheckpointError, naming the
    file, for a pickle that holds anything but tensors.
    """
    target = Path(cache) / f"unpickled-{hash_pickles(folder)[:32]}"
    if target.is_dir():
        return target
    with atomic_folder(target, keep_existing=True) as part:
        shutil.copytree(folder, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT))
        _convert(pickled_files(folder), part, tied)
        if is_lora(folder):
            (part / SINGLE).rename(part / LORA)
            # what it names as seen from its own folder is not there seen from the new one
            name_base(part, base_folder(folder))
    return target


def _convert(files: list[Path], out: Path, tied: Mapping[str, str]) -> None:
    held = {path: _tensors(path) for path in files}
    found = {name: tensor for tensors in held.values() for name, tensor in tensors.items()}
    if len(found) < sum(map(len, held.values())):
        raise CheckpointError(f"{files[0].parent}: expected each tensor in one file, found some in several")
    same = {
        name for name, other in tied.items() if name in found and other in found and _one(found[name], found[other])
    }
    codes = {name: code for code, name in TORCH_NAMES.items()}
    layout = {
        name: (codes[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in found.items()
        if name not in same
    }
    writer = TensorWriter(out, layout)
    for name in layout:
        _write(writer, name, found[name])
    writer.close()


def _one(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _write(writer: TensorWriter, name: str, tensor: Tensor) -> None:
    import torch

    flat = tensor.detach().contiguous().view(-1)
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE].view(torch.uint8)
        writer.write(name, start * tensor.element_size(), piece.numpy().data)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a pickle, mapped into memory where its format allows it."""
    import torch

    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # files of before torch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    # whatever a file may make the library raise
    except Exception as error:  # noqa: BLE001
        raise CheckpointError(
            f"{path}: expected a pickle of tensors alone, found another or a damaged one: {_reason(error)}"
        ) from None
    plain = found if isinstance(found, dict) else {}
    if not plain or not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in plain.items()):
        raise CheckpointError(f"{path}: expected tensors by name, found {_kind(found)}")
    return plain


def _reason(error: Exception) -> str:
    """What is wrong with a pickle; not the way around that the library names beside it."""
    said = str(error).strip()
    if called := re.search(r"GLOBAL (\S+)", said):
        return f"it calls {called[1]}, which makes no tensor"
    return type(error).__name__ if "weights_only" in said else (said.splitlines() or [type(error).__name__])[0]


def _kind(found: object) -> str:
    if isinstance(found, dict):
        return f"a mapping with {', '.join(map(str, list(found)[:3]))}"
    return type(found).__name__
