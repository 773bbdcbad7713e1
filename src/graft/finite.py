"""Weights that are numbers: NaN and Inf are found before anything is computed with them, and named. Light."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from graft.checkpoint import ADAPTER, FLOATS, TORCH_NAMES, TensorHeader, TensorReader
from graft.errors import CheckpointError
from graft.folders import parts_of
from graft.lineage import read_manifest
from graft.machine import cores

if TYPE_CHECKING:
    from torch import Tensor, nn


def finite(values: Tensor) -> bool:
    """Whether there is no NaN and no Inf. A sum finds them; only where it is not finite itself is each looked at."""
    import torch

    if values.itemsize == 2 and values.device.type == "cpu":
        return not values.numel() or _finite_bits(values)
    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(torch.isfinite(values).all())


def _finite_bits(values: Tensor) -> bool:
    """The same for two bytes a value: NaN and Inf are the largest of all patterns of bits, with either sign."""
    import numpy as np
    import torch

    bits = values.detach().view(torch.int16).numpy()
    infinite = 0x7F80 if values.dtype == torch.bfloat16 else 0x7C00
    return bool(bits.max() < infinite and bits.view(np.uint16).max() < 0x8000 + infinite)


def check_weights(folder: Path, *, threads: int | None = None, piece: int = 1 << 22) -> None:
    """Read all floating-point weights; raise CheckpointError naming each tensor that holds NaN or Inf."""
    import torch

    def bad(header: TensorHeader) -> str | None:
        count = 0
        for start in range(0, header.count, piece):
            values = reader.read(header.name, start, min(piece, header.count - start))
            count += int((~torch.isfinite(values)).sum())
        return _words(header.name, count, header.count, header.file)

    with TensorReader(folder) as reader, ThreadPoolExecutor(threads or cores()) as pool:
        floats = [h for _, h in sorted(reader.headers.items()) if h.dtype in FLOATS]
        _refuse(folder, list(pool.map(bad, floats)))


def check_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises CheckpointError naming each of these tensors, read from `file`, that holds NaN or Inf."""
    import torch

    wrong = {name: values for name, values in tensors.items() if _is_plain(values) and not finite(values)}
    counts = {name: int((~torch.isfinite(values)).sum()) for name, values in wrong.items()}
    _refuse(file.parent, [_words(name, counts[name], values.numel(), file) for name, values in wrong.items()])


def check_folder(folder: Path) -> None:
    """That the weights which a model is loaded from are numbers: its own, its members', its base's.

    Those of a folder with a manifest, whose hash holds, were looked at when it was made. Raises CheckpointError.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if read_manifest(folder) is None:
        if (folder / ADAPTER).is_file():
            check_tensors(load_file(folder / ADAPTER), folder / ADAPTER)
        elif any(folder.glob("*.safetensors")):
            check_weights(folder)
    for part in parts_of(folder):
        check_folder(part)


def check_loaded(model: nn.Module, folder: Path) -> None:
    """That the weights of a model are numbers, looked at where they are in memory already.

    Raises CheckpointError naming what is NaN or Inf in the folder's files, or only in the type it was loaded as.
    """
    if read_manifest(folder) is not None:
        return
    wrong = [name for name, values in model.named_parameters() if _is_plain(values) and not finite(values.detach())]
    if wrong:
        check_weights(folder)
        raise CheckpointError(
            f"{folder}: Inf in {_some(wrong)} as {model.dtype}, which cannot hold what the files say: load it as "
            "bfloat16 or float32"
        )


def _is_plain(values: Tensor) -> bool:
    """Whether the values are floating-point numbers, and not packed."""
    return str(values.dtype).removeprefix("torch.") in {TORCH_NAMES[name] for name in FLOATS}


def _words(name: str, bad: int, count: int, file: Path) -> str | None:
    return f"{name} ({bad} of {count} values, {file.name})" if bad else None


def _refuse(folder: Path, found: Sequence[str | None]) -> None:
    """Raises CheckpointError where `found` names something."""
    named = [text for text in found if text]
    if named:
        raise CheckpointError(f"{folder}: NaN or Inf in {_some(named)}: train or download it anew")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
