"""Hashes of weights: by blocks of each tensor, in any order, on all cores, or while they are being written.

    block → XXH3-128;  tensor → XXH3-128 of name, dtype, shape and its blocks' hashes;  model → of its tensors', by name

A hash tells which weights these are and notices damage. It does not withstand forgery: whoever may write the weights
may write the manifest beside them. Hashes without a prefix are those of older manifests, sha256 of each tensor whole;
they are still taken where one is to be compared (`way`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from threading import local
from typing import Literal, TypeVar

from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from graft import remembered
from graft.checkpoint import INDEX, TensorReader, TensorWriter, weight_files
from graft.machine import boot, cores

A = TypeVar("A")
B = TypeVar("B")
Way = Literal["xxh3:", "sha256"]
"""How a hash was taken; the first stands before it."""
SETTLED_NS = 2 * 10**9
BLOCK = 1 << 20
"""Bytes that are hashed together: no more than lie in a core's cache. All hashes change with it."""
RUN = 16
"""Blocks that a thread takes at a time."""
Stamps = tuple[tuple[str, int, int, int, int], ...]
_OWN = local()
_WRITTEN: dict[Path, tuple[Stamps, str]] = {}
"""Of folders that this process wrote: the state of the files, and the hash of what was written."""


def way_of(told: str) -> Way:
    """How a hash was taken, from how it is written."""
    return "xxh3:" if told.startswith("xxh3:") else "sha256"


def shortened(told: str) -> str:
    """The first digits of a hash, for people."""
    return told.removeprefix("xxh3:")[:12]


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_text(text: str, way: Way = "xxh3:") -> str:
    """Hash of a text, as those of weights are written."""
    plain = text.encode()
    return f"xxh3:{xxh3_128_hexdigest(plain)}" if way == "xxh3:" else hashlib.sha256(plain).hexdigest()


def hash_weights(folder: Path, way: Way = "xxh3:") -> str:
    """Hash of all tensors (name, dtype, shape, bytes), the same however they are sharded.

    A process that asks again gets what it was told, as long as the files are those they were; of a folder without a
    manifest, whose weights nobody vouches for, later processes get it as well until the machine starts anew.
    """
    folder = Path(folder).resolve()
    stamps = _file_stamps(folder)
    if way == "xxh3:" and folder in _WRITTEN and _WRITTEN[folder][0] == stamps:
        return _WRITTEN[folder][1]
    # a file that has just been written may change once more within one tick of the file system's clock
    newest = max(max(modified, changed) for *_, modified, changed in stamps)
    if time.time_ns() - newest <= SETTLED_NS:
        return _hash_files(folder, way)
    vouched = (folder / "graft.json").exists()
    return _hash_once(folder, stamps, way) if vouched else _hash_remembered(folder, stamps, way)


class Digests:
    """A writer whose weights are hashed while they lie in the cache that they were made in."""

    def __init__(self, writer: TensorWriter):
        self.headers = writer.headers
        self._writer = writer
        self._found: dict[tuple[str, int], bytes] = {}

    def write(self, name: str, start: int, piece: memoryview | bytes) -> None:
        """`TensorWriter.write`. From any thread."""
        self._writer.write(name, start, piece)
        view, header = memoryview(piece).cast("B"), self.headers[name]
        last = start + len(view) == header.end - header.start
        for at in range(-start % BLOCK, len(view), BLOCK):
            # a block of which another piece has a part is read again at the end
            if last or at + BLOCK <= len(view):
                self._found[name, start + at] = xxh3_128_digest(view[at : at + BLOCK])

    def finish(self) -> None:
        """All is written: `hash_weights` of this process knows the hash while the files stay as they are."""
        folder = self._writer.folder.resolve()
        with TensorReader(folder) as reader:
            _WRITTEN[folder] = _file_stamps(folder), _by_blocks(reader, self._found)


def _file_stamps(folder: Path) -> Stamps:
    stats = {path.name: path.stat() for path in [*weight_files(folder), *folder.glob(INDEX)]}
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats.items())


def _hash_remembered(folder: Path, stamps: Stamps, way: Way) -> str:
    told = json.dumps([stamps, boot()])
    about = str(folder) if way == "sha256" else f"{way}{folder}"
    before, _, found = (remembered.recall("hashes", about) or "").partition("\n")
    if before != told or not found:
        found = _hash_once(folder, stamps, way)
        remembered.keep("hashes", about, f"{told}\n{found}")
    return found


@lru_cache(maxsize=128)
def _hash_once(folder: Path, stamps: Stamps, way: Way) -> str:
    return _hash_files(folder, way)


def _hash_files(folder: Path, way: Way) -> str:
    with TensorReader(folder) as reader:
        return _by_blocks(reader, {}) if way == "xxh3:" else _by_tensors(reader)


def _by_blocks(reader: TensorReader, known: Mapping[tuple[str, int], bytes]) -> str:
    """The hash of all tensors. Blocks, by tensor and first byte, are read where they are not `known` yet."""
    blocks = [(name, start) for name in reader.names for start in range(0, _bytes(reader, name), BLOCK)]
    left = [block for block in blocks if block not in known]
    runs = [left[at : at + RUN] for at in range(0, len(left), RUN)]
    found = dict(known)
    for run, digests in zip(runs, _map(lambda run: [_block(reader, *block) for block in run], runs), strict=True):
        found.update(zip(run, digests, strict=True))
    parts: dict[str, list[bytes]] = {name: [_head(reader, name)] for name in reader.names}
    for block in blocks:
        parts[block[0]].append(found[block])
    return f"xxh3:{xxh3_128_hexdigest(b''.join(xxh3_128_digest(b''.join(part)) for part in parts.values()))}"


def _block(reader: TensorReader, name: str, start: int) -> bytes:
    view = _buffer()[: min(BLOCK, _bytes(reader, name) - start)]
    reader.read_into(name, start, view)
    return xxh3_128_digest(view)


def _by_tensors(reader: TensorReader) -> str:
    """sha256 of the tensors' sha256, by name."""
    # the largest first, so that no core is left alone with one of them
    largest_first = sorted(reader.names, key=lambda name: -_bytes(reader, name))
    found = dict(zip(largest_first, _map(lambda name: _whole(reader, name), largest_first), strict=True))
    return hashlib.sha256(b"".join(found[name] for name in reader.names)).hexdigest()


def _whole(reader: TensorReader, name: str) -> bytes:
    digest, size = hashlib.sha256(_head(reader, name)), _bytes(reader, name)
    for start in range(0, size, BLOCK):
        view = _buffer()[: min(BLOCK, size - start)]
        reader.read_into(name, start, view)
        digest.update(view)
    return digest.digest()


def _head(reader: TensorReader, name: str) -> bytes:
    header = reader.headers[name]
    return json.dumps([name, header.dtype, header.shape]).encode()


def _bytes(reader: TensorReader, name: str) -> int:
    return reader.headers[name].end - reader.headers[name].start


def _map(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(function, items))


def _buffer() -> memoryview:
    """This thread's own, which lies in its core's cache."""
    if not hasattr(_OWN, "buffer"):
        _OWN.buffer = memoryview(bytearray(BLOCK))
    return _OWN.buffer
