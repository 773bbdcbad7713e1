"""Files of weights, without models: headers and streamed safetensors."""

from __future__ import annotations

import json
import math
import operator
import os
import shutil
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.disk import atomic_write, disk_errors, free_space
from graft.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter.safetensors"
"""Weights that stand beside those of a frozen model, which lies elsewhere."""
LORA = "adapter_model.safetensors"
"""Factors of an adapter in the form of peft."""
WIDTH = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of one element, by the dtype names of safetensors."""
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies: `file`, `start` and `end` bytes in it, `dtype` as safetensors names it, `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def stored(self) -> str:
        """The dtype in which a model that is made from this one keeps the tensor."""
        return self.dtype

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Headers = dict[str, TensorHeader]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order. Raises CheckpointError for what is missing."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        names = sorted(set(read_index(folder).values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder}: missing {len(missing)} of {len(names)} shards: {', '.join(missing)}")
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / LORA).exists():
        return [folder / LORA]
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a model's folder, found nothing there")
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder}: expected {SINGLE} or {INDEX}, found an adapter, whose weights are changes of another model's: "
            "tune with `fold: true` (graft.adapt with `fold=True`, `graft adapt --fold true`) to get a whole model"
        )
    said = folder / "config.json"
    if said.is_file() and b'"graft_adapted"' in said.read_bytes():
        raise CheckpointError(f"{folder}: expected the adapters' weights in {ADAPTER}, found no such file")
    pickles = [p.name for p in folder.glob("*.bin")]
    hint = (
        f"; {pickles[0]} is a pickle, which is not read: a merge of it alone with `allow_pickle: true` "
        "(`graft merge OUT FOLDER --allow-pickle`) converts it"
        if pickles
        else ""
    )
    raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found neither{hint}")


def read_index(folder: Path) -> dict[str, str]:
    """Which file holds each tensor, from the index. Raises CheckpointError for an index that is damaged.

    Files stand beside it; those of a head (`MODEL/heads/TASK`) may stand in the model's folder.
    """
    path = Path(folder) / INDEX
    above = "../../" if path.absolute().parent.parent.name == "heads" else ""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected an index with a weight_map, found a damaged file ({error})") from None
    for name in (name.removeprefix(above) for name in weight_map.values()):
        if "/" in name or "\\" in name or name.startswith("."):
            raise CheckpointError(f"{path}: expected file names beside it, found {name!r}")
    return weight_map


def read_headers(folder: Path) -> Headers:
    """Every tensor of a model folder, from the headers of its files alone.

    Raises CheckpointError, naming file and tensor, for files that are truncated or corrupt, for shards and tensors that
    are missing, and for a tensor that stands in two shards.
    """
    headers: Headers = {}
    for path in weight_files(folder):
        for name, header in read_file_headers(path).items():
            if name in headers:
                raise CheckpointError(f"{path}: tensor {name} stands in {headers[name].file.name} as well")
            headers[name] = header
    if (Path(folder) / INDEX).exists():
        for name, file in read_index(folder).items():
            if name not in headers:
                raise CheckpointError(f"{Path(folder) / file}: expected tensor {name} (by the index), found it nowhere")
    return headers


def read_file_headers(path: Path) -> Headers:
    """The tensors of one safetensors file. Raises CheckpointError for a truncated or corrupt file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: expected a safetensors file, found {size} bytes; get the file anew")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path}: the header wants {length} bytes and the file has {size}; truncated or no safetensors file"
            )
        try:
            raw = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: the header is damaged ({error}); get the file anew") from None
    headers = {}
    for name, entry in raw.items():
        if name != "__metadata__":
            headers[name] = _header(path, name, entry, 8 + length, size)
    _check_layout(path, headers, 8 + length)
    return headers


def _header(path: Path, name: str, entry: Any, base: int, size: int) -> TensorHeader:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(map(operator.index, entry["shape"])), entry["data_offsets"]
        header = TensorHeader(name, dtype, shape, path, base + start, base + end)
        expected = header.count * WIDTH[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header of tensor {name} is damaged ({error!r})") from None
    if end - start != expected or start < 0:
        raise CheckpointError(
            f"{path}: tensor {name} {dtype}{list(shape)} needs {expected} bytes, its header gives {end - start}"
        )
    if base + end > size:
        raise CheckpointError(
            f"{path}: tensor {name} ends at byte {base + end} and the file at {size}: truncated; get the file anew"
        )
    return header


def _check_layout(path: Path, headers: Headers, base: int) -> None:
    reached = base
    for header in sorted(headers.values(), key=lambda h: (h.start, h.end)):
        if header.start < reached:
            raise CheckpointError(f"{path}: tensor {header.name} overlaps the one before it: the header is corrupt")
        reached = header.end


class TensorReader:
    """Reads pieces of tensors by `pread` into buffers of the caller: no page faults, safe from many threads."""

    def __init__(self, folder: Path):
        self.folder = Path(folder).resolve()
        self.headers = read_headers(Path(folder))
        self._files: dict[Path, int] = {}
        for header in self.headers.values():
            if header.file not in self._files:
                self._files[header.file] = os.open(header.file, os.O_RDONLY)

    @property
    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self.headers)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start`. Raises CheckpointError where the file ends early."""
        header = self.headers[name]
        done = 0
        while done < len(buffer):
            got = os.preadv(self._files[header.file], [buffer[done:]], header.start + start + done)
            if got <= 0:
                raise CheckpointError(f"{header.file}: tensor {name}: the file ended while it was read")
            done += got

    def read(self, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """`count` elements from element `start`, flat; the whole tensor in its shape where `count` is None."""
        import torch

        header = self.headers[name]
        size = header.count if count is None else count
        width = WIDTH[header.dtype]
        buffer = bytearray(size * width)
        self.read_into(name, start * width, memoryview(buffer))
        dtype = getattr(torch, TORCH_NAMES[header.dtype])
        flat = torch.frombuffer(buffer, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return flat.reshape(header.shape) if count is None else flat

    def origin(self, name: str) -> Path:
        """The file to look at where the tensor's values are no numbers."""
        return self.headers[name].file

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TensorWriter:
    """Writes safetensors whose layout is declared first; pieces may then come in any order, from many threads.

    `layout` gives (dtype as safetensors names it, shape) of each tensor; they are laid out by name, in shards of
    at most `shard_bytes`. Raises DiskError before the first byte where the disk has too little room.
    """

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, tuple[str, tuple[int, ...]]],
        shard_bytes: int = 5 * 10**9,
        *,
        resume: bool = False,
    ):
        self.folder = Path(folder)
        self.headers: Headers = {}
        shards = _shards(layout, shard_bytes)
        names = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        )
        self._files: dict[Path, int] = {}
        # the system lets one thread at a time write to a file, and keeps the others busy with waiting
        self._turn = threading.Lock()
        with disk_errors(self.folder):
            free_space(self.folder, sum(_size(*layout[n]) for n in layout), reuse=self.folder if resume else None)
            for file, tensors in zip(names, shards, strict=True):
                self._lay_out(self.folder / file, {name: layout[name] for name in tensors})
            if len(shards) > 1:
                total = sum(_size(*layout[name]) for name in layout)
                index = {
                    "metadata": {"total_size": total},
                    "weight_map": {n: h.file.name for n, h in sorted(self.headers.items())},
                }
                (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _lay_out(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for name, (dtype, shape) in tensors.items():
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + _size(dtype, shape)]}
            place += _size(dtype, shape)
        head = json.dumps(entries, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.truncate(file, 8 + len(head) + place)
        os.pwrite(file, struct.pack("<Q", len(head)) + head, 0)
        self._files[path] = file
        for name, (dtype, shape) in tensors.items():
            start, end = entries[name]["data_offsets"]
            self.headers[name] = TensorHeader(
                name, dtype, tuple(shape), path, 8 + len(head) + start, 8 + len(head) + end
            )

    def write(self, name: str, start: int, piece: memoryview | bytes) -> None:
        """Put `piece` at byte `start` of the tensor. Raises DiskError where the disk is full."""
        header = self.headers[name]
        view, done = memoryview(piece).cast("B"), 0
        with disk_errors(header.file), self._turn:
            while done < len(view):
                done += os.pwrite(self._files[header.file], view[done:], header.start + start + done)

    def close(self) -> None:
        """Close the files. The system brings them to the disk when it likes to: `sync_folder` waits for that."""
        with disk_errors(self.folder):
            while self._files:
                os.close(self._files.popitem()[1])


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return WIDTH[dtype] * math.prod(shape)


def _shards(layout: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(layout):
        size = _size(*layout[name])
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def copy_model(folder: Path, target: Path, leave: Sequence[str] = ()) -> None:
    """Copy a model's folder to `target`, but for names like those in `leave`; weights that its index names in other
    folders, as a head's does those of its body, are copied into `target` too, and named there.

    Raises DiskError where it is full or may not be written.
    """
    with disk_errors(target):
        shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*leave))
    if not (target / INDEX).is_file():
        return
    where = read_index(folder)
    outside = sorted({file for file in where.values() if Path(file).name != file})
    inside = {file: f"{number}-{Path(file).name}" for number, file in enumerate(outside, start=1)}
    for file, name in inside.items():
        shutil.copyfile(folder / file, target / name)
    if inside:
        index = json.loads((target / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {name: inside.get(file, file) for name, file in where.items()}
        atomic_write(target / INDEX, json.dumps(index, indent=1) + "\n")
