"""`results.jsonl` and the files of items beside it: appended to, never rewritten; a torn last line is cut."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graft.disk import atomic_write, disk_errors

Row = dict[str, Any]
VERSION = 5
"""Counted up when the same model and items give other numbers; every row says by which it was measured."""


class Results:
    """The rows of one folder."""

    def __init__(self, folder: Path):
        self.folder, self.path = Path(folder), Path(folder) / "results.jsonl"
        with disk_errors(self.folder):
            (self.folder / "items").mkdir(parents=True, exist_ok=True)
        self.rows = self._read()
        self._by_key = {row["key"]: row for row in self.rows if "key" in row}

    def _read(self) -> list[Row]:
        """All whole lines; what a kill left of a last one is cut off the file."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        rows = []
        for line in whole.splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        if len(whole) < len(content):
            with disk_errors(self.path):
                os.truncate(self.path, len(whole))
        return rows

    def get(self, key: str) -> Row | None:
        """The row that was computed for `key` before; one that does not say by which version is written again."""
        row = self._by_key.get(key)
        return row if row is None or "evaluation" in row else self.append(row)

    def append(self, row: Row) -> Row:
        """Add a row, with the version of what measured it, and bring it to the disk."""
        row = {**row, "evaluation": VERSION}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        self._by_key[row["key"]] = row
        return row

    def write_items(self, key: str, ids: list[str], statistics: np.ndarray, notes: list[dict[str, Any]]) -> str:
        """Per-item statistics and notes in a file of their own; its name relative to the folder."""
        name = f"items/{key[:32]}.jsonl.gz"
        lines = [
            json.dumps({"id": i, "statistics": s, **n}, ensure_ascii=False)
            for i, s, n in zip(ids, statistics.tolist(), notes, strict=True)
        ]
        atomic_write(
            self.folder / name, gzip.compress(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"), 6, mtime=0)
        )
        return name

    def read_items(self, row: Mapping[str, Any]) -> tuple[list[str], np.ndarray] | None:
        """Ids and statistics behind a row; None where the file is gone."""
        path = self.folder / row["items"]
        if not path.exists():
            return None
        lines = [
            json.loads(line)
            for line in gzip.decompress(path.read_bytes()).decode("utf-8", "surrogatepass").splitlines()
        ]
        return [line["id"] for line in lines], np.array([line["statistics"] for line in lines], np.float64)


def key_of(**parts: Any) -> str:
    """sha256 of what identifies a result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
