"""Text out of files: found from paths and globs, decompressed on the way, with errors that name file and line."""

from __future__ import annotations

import codecs
import glob
import gzip
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from graft.errors import DataError

SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}
"""What is taken from a folder, by source; but for parquet, which packs its columns itself, COMPRESSED behind it too."""
COMPRESSED = (".gz", ".xz")
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
"""What decompressing raises where a file is damaged."""
BLOCK = 1 << 18
"""Bytes of text that are read together, so that work on them is done in few calls."""


def find(path: str, source: str, root: Path) -> list[Path]:
    """The files that `path` (a file, a folder or a glob, relative to `root`) stands for, in a fixed order.

    Raises DataError where there is none.
    """
    place = root / Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [p for p in place.rglob("*") if p.is_file() and _plain_suffix(p) in SUFFIXES[source]]
    else:
        found = [Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file()]
    if not found:
        kinds = f"files ending in {', '.join(SUFFIXES[source])}" if place.is_dir() else "a file, folder or glob"
        raise DataError(f"{place}: expected {kinds}, found none; paths are relative to the recipe's folder")
    return sorted(found)


def left_out(path: str, source: str, root: Path) -> str:
    """A sentence on the commonest kind of file that `find` leaves out of a folder, where there are more of these than
    of what it takes; empty otherwise."""
    place = root / Path(path).expanduser()
    there = Counter(_plain_suffix(p) for p in place.rglob("*") if p.is_file()) if place.is_dir() else Counter()
    taken = sum(there.pop(suffix, 0) for suffix in SUFFIXES[source])
    suffix, count = max(there.items(), key=lambda kind: kind[1], default=("", 0))
    if count <= taken or not suffix:
        return ""
    return (
        f"of {path} only files ending in {', '.join(SUFFIXES[source])} are read ({taken}); "
        f"`{path.rstrip('/')}/**/*{suffix}` names the {count} that end in {suffix}"
    )


def source_of(path: Path) -> str | None:
    """The source that files with such an ending are for; None where it does not tell."""
    return next((source for source, suffixes in SUFFIXES.items() if _plain_suffix(path) in suffixes), None)


def begins_as_text(path: Path) -> bool:
    """Whether the first lines of a file are text, whatever it is called."""
    try:
        return next(texts(path), None) is not None
    except DataError:
        return False


def _plain_suffix(path: Path) -> str:
    return (Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix).lower()


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed where its name ends in `.gz` or `.xz`."""
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        if path.suffix == ".xz":
            return lzma.open(path, "rb")
        return open(path, "rb")
    except PermissionError:
        raise DataError(f"{path}: may not be read; change its permissions") from None


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(number of the first line, from 1; whole lines, `\n` between them, without their last end), block by block.

    `\r` before a line's end is taken away. Raises DataError for what is not UTF-8 text, naming the line, once the lines
    before it are given.
    """
    number = 1
    try:
        with open_bytes(path) as file:
            for raw in _whole_lines(file):
                yield from _decoded(path, number, raw)
                number += raw.count(b"\n") + 1
    except DAMAGED as error:
        raise _cut_short(path, number - 1, error) from None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end). Raises DataError as `texts` does."""
    for number, text in texts(path):
        yield from enumerate(text.split("\n"), number)


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The content cut at line ends, which are left out there, into blocks of about BLOCK bytes or one longer line."""
    held: list[bytes] = []
    while raw := file.read1(BLOCK):  # type: ignore[attr-defined]
        end = raw.rfind(b"\n")
        if end >= 0:
            yield b"".join([*held, raw[:end]])
            held = []
        held.append(raw[end + 1 :])
    if rest := b"".join(held):
        yield rest


def _decoded(path: Path, number: int, raw: bytes) -> Iterator[tuple[int, str]]:
    """The lines from `number` on as text: together, or one by one up to the one that is none."""
    try:
        yield number, _text(path, number, raw)
    except DataError:
        yield from ((at, _text(path, at, line)) for at, line in enumerate(raw.split(b"\n"), number))


def _text(path: Path, number: int, raw: bytes) -> str:
    if b"\0" in raw:
        raise DataError(f"{path}, line {number}: expected text, found binary data")
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from None
    return "\n".join(line.rstrip("\r") for line in text.split("\n")) if "\r" in text else text


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    found = error.object[error.start]
    return DataError(f"{path}, line {line}: expected UTF-8 text, found byte 0x{found:02x}; convert it")


def _cut_short(path: Path, line: int, error: Exception) -> DataError:
    return DataError(f"{path}, after line {line}: the compressed file is damaged or cut short ({error})")


def blocks(path: Path, size: int) -> Iterator[str]:
    """The text in blocks of about `size` bytes, cut behind a line end where there is one; line ends are made `\\n`.

    A text of less than `size` is one block, without its last line end. Raises DataError as `lines` does.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held, number = "", 1
    try:
        with open_bytes(path) as file:
            while raw := file.read(size):
                if b"\0" in raw:
                    number += raw[: raw.index(b"\0")].count(b"\n")
                    raise DataError(f"{path}, line {number}: expected text, found binary data")
                text = held + decoder.decode(raw)
                number += raw.count(b"\n")
                end = (text.rfind("\n") + 1 or len(text)) if len(raw) == size else 0
                held = text[end:]
                if end:
                    yield text[:end].replace("\r\n", "\n")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        number += error.object[: error.start].count(b"\n")
        raise _not_utf8(path, number, error) from None
    except DAMAGED as error:
        raise _cut_short(path, number - 1, error) from None
    if held:
        yield held.replace("\r\n", "\n").removesuffix("\n")
