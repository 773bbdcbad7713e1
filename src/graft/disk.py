"""Files and folders that are there whole or not at all: written beside and renamed, with errors that name the place."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graft.errors import DiskError, GraftError
from graft.machine import size

LEFT_AFTER = 3600
"""Seconds after which a folder that nobody writes is what a kill left."""


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into a DiskError that names `place`.

    Those of the writers of safetensors and torch, which have errors of their own for them, too.
    """
    try:
        yield
    except GraftError:
        raise
    except Exception as error:
        number = _errno(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"{place}: the disk is full; free some space and run again, nothing is lost") from error
        if number == errno.EFBIG:
            raise DiskError(
                f"{place}: a file would be larger than this process may write; raise the limit (`ulimit -f`) or make "
                "smaller files, nothing is lost"
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DiskError(f"{place}: may not be written; change its permissions or choose another folder") from error
        raise


def _errno(error: Exception) -> int | None:
    """The system's number of what went wrong, as far as the error says."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # shutil says what happened to each file of a folder, the writer of safetensors has words of its own
    if found := re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", str(error)):
        return int(found[1] or found[2])
    # torch's writer does not say why; a write that stops short is a disk that is full
    return errno.ENOSPC if re.search(r"PytorchStreamWriter failed|unexpected pos \d+ vs", str(error)) else None


def free_space(folder: Path, needed: int, *, reuse: Path | None = None) -> None:
    """Raises DiskError where the disk of `folder` has less than `needed` bytes free, those of `reuse` included."""
    free = shutil.disk_usage(folder).free
    if reuse is not None:
        free += sum(p.stat().st_blocks * 512 for p in reuse.iterdir() if p.is_file())
    if free < needed:
        raise DiskError(f"{folder}: needs {size(needed)} and the disk has {size(free)} free")


@contextmanager
def atomic_folder(target: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A folder beside `target` that is renamed onto it at the end; an error or a kill leaves what was there before.

    `keep_existing`: where somebody else has made `target` meanwhile, theirs stays (the content is the same).
    """
    target = Path(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(".*.part"):
            if _is_left(left):
                shutil.rmtree(left, ignore_errors=True)
        part = target.parent / f".{target.name}.{os.getpid()}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            replace_folder(part, target, keep_existing=keep_existing)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _is_left(part: Path) -> bool:
    """Whether who wrote this folder was killed: nobody here has its number, and nobody elsewhere has gone on lately."""
    import psutil

    number = part.name.split(".")[-2]
    if not number.isdecimal() or psutil.pid_exists(int(number)):
        return False
    try:
        latest = max(path.stat().st_mtime for path in (part, *part.iterdir()))
    except OSError:
        # somebody else removes it
        return False
    return time.time() - latest > LEFT_AFTER


def replace_folder(made: Path, target: Path, *, keep_existing: bool = False, on_disk: bool = True) -> None:
    """Rename `made` onto `target`; an older `target` is removed only after that.

    `on_disk`: wait until the disk has it, so that it is whole even where the machine goes down.
    """
    _permit(made)
    if on_disk:
        sync_folder(made)
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    if target.exists():
        if keep_existing:
            return
        os.rename(target, old)
    try:
        os.rename(made, target)
    except OSError as error:
        if keep_existing and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def _permit(folder: Path) -> None:
    """Files that safetensors wrote for their owner alone get the mode of all others that are new.

    What stands elsewhere too is not ours.
    """
    os.umask(mask := os.umask(0))
    for path in folder.rglob("*.safetensors"):
        found = path.lstat()
        if stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600 and found.st_nlink == 1:
            path.chmod(0o666 & ~mask)


def sync_folder(folder: Path) -> None:
    """fsync of every file in `folder` and of the folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file beside `path` and rename it: readers see the old content or the new, never a part."""
    path = Path(path)
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    with disk_errors(path):
        try:
            with open(part, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
