"""From the settings of a source to a stream of records: plain dicts, in a fixed order.

`read(settings, root)` yields `(split, record)`, where split is None for what is to be split by hash and SAME for
the next part of a text too long to be held.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import sysconfig
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from graft.data import files, hugging_face, library
from graft.data import settings as kinds
from graft.errors import DataError

Record = dict[str, Any]
Tagged = tuple[str | None, Record]

SAME = "same"
"""In the place of a split: that of the record before, whose text goes on here."""
NOTHING = {"text": ""}
"""A record of which nothing can be read; passed over, as blank documents of text files are."""
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
"""Folders of the interpreter's library that hold no text of its own, or none worth learning."""
BLANK = {"jsonl": "nothing but white space", "csv": "no row below a header", "parquet": "none"}
"""What is said of a file that holds something, and no records, by its source."""
MOST = 1 << 22
"""Bytes of a document in a text file that are held at once; a longer one comes in parts."""


def read(settings: kinds.Source, root: Path) -> Iterator[Tagged]:
    """All records of a source. Raises DataError, naming file and line, for what cannot be read."""
    readers: dict[type, Callable[..., Iterator[Tagged]]] = {
        kinds.PythonLibrary: _python_library,
        kinds.TextFiles: _text,
        kinds.Jsonl: _records,
        kinds.Csv: _records,
        kinds.Parquet: _records,
        kinds.HuggingFace: _hugging_face,
    }
    for part in _groups(settings):
        rows = readers[type(settings)](part, root)
        yield from rows if isinstance(part, kinds.HuggingFace) else itertools.islice(rows, settings.limit)


def _groups(settings: kinds.Source) -> Iterator[kinds.Source]:
    """The settings once for each group of files, so that `limit` holds for each."""
    if isinstance(settings, kinds.Files):
        groups = list(settings.groups())
        for group in groups:
            yield settings.model_copy(update={other: None for other in groups if other != group})
    else:
        yield settings


def content_files(settings: kinds.Source, root: Path) -> list[tuple[str | None, Path]]:
    """(split it is given to, file) of all files whose content decides what `read` gives.

    Empty where there are none to name: what a data set on the hub holds is decided by its commit (`commit`).
    """
    if isinstance(settings, kinds.PythonLibrary):
        return [(None, path) for _, path in library_files(settings.packages)]
    if isinstance(settings, kinds.Files):
        return list(_placed(settings, root))
    assert isinstance(settings, kinds.HuggingFace)
    return [(None, path) for path in hugging_face.files(settings, root)]


def misread(settings: kinds.DataSettings, root: Path) -> str:
    """A hint where a file that is read as plain text ends as files of records do, or a folder holds more files that are
    not read than files that are; empty where there is nothing to say."""
    if not isinstance(settings, kinds.Files):
        return ""
    for _, path in _placed(settings, root) if isinstance(settings, kinds.TextFiles) else ():
        if (source := files.source_of(path)) not in (None, "text"):
            return f"{path.name} is read as plain text: `source: {source}` reads the records in it"
    named = (path for paths in settings.groups().values() for path in paths)
    return next(filter(None, (files.left_out(path, settings.source, root) for path in named)), "")


def commit(settings: kinds.Source, root: Path) -> str | None:
    """The commit on the hub that is read; None for what does not come from there. Raises DataError for no such id."""
    return hugging_face.commit(settings, root) if isinstance(settings, kinds.HuggingFace) else None


def library_files(packages: list[str]) -> list[tuple[str, Path]]:
    """(name such as `json/decoder.py`, path) of the interpreter's own library, tests and packages of others left out.

    Raises DataError for a package that is not part of it.
    """
    top = sysconfig.get_paths()["stdlib"]
    if not packages:
        return sorted(_modules(top, "").items())
    names: dict[str, Path] = {}
    for package in packages:
        found = _modules(top, package.replace(".", "/")) if package else {}
        if not found:
            raise DataError(f"expected a package of this interpreter's library, found {package!r}")
        names |= found
    return sorted(names.items())


def _modules(top: str, inside: str) -> dict[str, Path]:
    """name → path of the modules in a folder of the library, and of the module of that name; none where left out."""
    if inside and not all(part.isidentifier() and part not in LEFT_OUT for part in inside.split("/")):
        return {}
    names = [f"{inside}.py"] if os.path.isfile(f"{top}/{inside}.py") else []
    for folder, folders, file_names in os.walk(os.path.join(top, inside)):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        place = Path(folder).relative_to(top).as_posix()
        names += [name if place == "." else f"{place}/{name}" for name in file_names if name.endswith(".py")]
    return {name: Path(top, name) for name in names}


def _python_library(settings: kinds.PythonLibrary, root: Path) -> Iterator[Tagged]:
    for name, path in library_files(settings.packages):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few library files state another encoding on purpose
            continue
        if settings.keep == "code":
            if text.strip():
                yield None, {"text": text}
        elif settings.keep == "tokens":
            yield from ((None, record) for record in library.statements(text))
        elif settings.keep == "packages":
            package = name.partition("/")[0].removesuffix(".py")
            yield from ((None, {"text": opening, "label": package}) for opening in library.openings(text))
        else:
            yield from ((None, {"text": prose}) for prose in library.docstrings(text))


def _text(settings: kinds.TextFiles, root: Path) -> Iterator[Tagged]:
    for split, path in _placed(settings, root):
        empty = True
        for goes_on, text in _documents(path, settings):
            empty = False
            yield (SAME if goes_on and split is None else split), {"text": text}
        if empty:
            raise DataError(f"{path}: expected text, found {_blank(path, 'nothing but white space')}")


def _documents(path: Path, settings: kinds.TextFiles) -> Iterator[tuple[bool, str]]:
    """(whether it goes on from the text before it, text); a document of more than MOST bytes comes in parts."""
    if settings.separator is None and settings.document == "line":
        found: Iterator[tuple[bool, str]] = ((False, line) for _, line in files.lines(path))
    elif settings.separator is None and settings.document == "file":
        found = ((number > 0, block) for number, block in enumerate(files.blocks(path, MOST)))
    else:
        found = _between(files.texts(path), settings.separator)
    yield from ((goes_on, text) for goes_on, text in found if text.strip())


def _between(blocks: Iterator[tuple[int, str]], separator: str | None) -> Iterator[tuple[bool, str]]:
    """What stands between lines that read `separator`, or between empty ones; `blocks` are whole lines."""
    line = r"[^\S\n]*+" if separator is None else re.escape(separator)
    separators = re.compile(rf"\n{line}(?=\n|\Z)")
    held, goes_on = "", False  # of the document that is being read, "\n" before every line
    for _, block in blocks:
        for number, part in enumerate(separators.split(f"\n{block}")):
            if number > 0:  # behind a separator
                yield goes_on, held[1:]
                held, goes_on = "", False
            held += part
            while (end := held.find("\n", MOST + 1)) > 0:
                yield goes_on, held[1:end]
                held, goes_on = held[end:], True
    yield goes_on, held[1:]


def _placed(settings: kinds.Files, root: Path) -> Iterator[tuple[str | None, Path]]:
    """Every file with the split it is given to, or None."""
    for group, paths in settings.groups().items():
        for path in paths:
            for file in files.find(path, settings.source, root):
                yield (None if group == "path" else group), file


def _records(settings: kinds.Records, root: Path) -> Iterator[Tagged]:
    rows = {kinds.Jsonl: _jsonl_rows, kinds.Csv: _csv_rows, kinds.Parquet: _parquet_rows}[type(settings)]
    shape = Shape(settings.format, settings.fields)
    for split, path in _placed(settings, root):
        place, read = f"{path}", False
        for place, row in rows(path):
            if (record := shape.record(row, place)) != NOTHING:
                read = True
                yield split, record
        if place == f"{path}":
            raise DataError(f"{path}: expected records, found {_blank(path, BLANK[settings.source])}")
        if not read:
            raise DataError(f"{path}: expected text, found records whose text is empty, all of them")


def _blank(path: Path, words: str) -> str:
    """What there is in a file of which nothing can be read: nothing at all, or what `words` say."""
    with files.open_bytes(path) as file:
        return words if file.read(1) else "an empty file"


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in files.lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
            if "\\ud" in line or "\\uD" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: expected a JSON object, found {line[:60]!r} ({error.msg})") from None
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise DataError(f"{place}: expected text, found {half}, half of a surrogate pair; replace it") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected a JSON object, found {type(row).__name__} {line[:60]!r}")
        yield place, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Record]]:
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    csv.field_size_limit(2**31 - 1)  # a whole document may stand in one field
    reader = csv.DictReader((f"{line}\n" for _, line in files.lines(path)), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or [])
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{path}, line 1: expected a name for each column, found {twice[0]!r} twice")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                found = len([v for k, v in row.items() if k is not None and v is not None]) + len(row.get(None) or [])
                wanted = f"expected {len(names)} values as in the header"
                raise DataError(f"{place}: {wanted}, found {found}{_separated(names)}")
            yield place, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: expected comma-separated values ({error})") from None


def _separated(names: Collection[Any]) -> str:
    """A hint where the one name of a header looks like several with another separator between; else empty."""
    (one, *others) = map(str, names) if names else [""]
    other = next((sign for sign in ";|\t" if sign in one), None)
    if others or other is None:
        return ""
    return f" (one name: is it several, separated by {other!r}? `.csv` is read by commas, `.tsv` by tabs)"


def _parquet_rows(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix in files.COMPRESSED:
        raise DataError(f"{path}: expected a parquet file as it is, packed inside, found a {path.suffix}; unpack it")
    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pa.ArrowInvalid, pa.ArrowIOError) as error:
        raise DataError(f"{path}: expected a parquet file ({error})") from None


def _hugging_face(settings: kinds.HuggingFace, root: Path) -> Iterator[Tagged]:
    shape = Shape(settings.format, settings.fields)
    for name, split, rows in hugging_face.splits(settings, root):
        for number, row in enumerate(itertools.islice(rows, settings.limit), 1):
            if (record := shape.record(row, f"{settings.name}, {name} {number}")) != NOTHING:
                yield split, record


class Shape:
    """Turns a row of a file into a record of one format; the format is inferred from the first row unless given."""

    def __init__(self, format: str | None, fields: dict[str, str]):
        self.format, self.fields = format, fields

    def record(self, row: Record, place: str) -> Record:
        """The record. Raises DataError, naming `place`, where a field is missing or of the wrong type."""
        if self.format == "raw":
            return dict(row)
        self.format = self.format or self._infer(row, place)
        record = {}
        for name in kinds.FIELDS[self.format]:
            key = self.fields.get(name, name)
            if key not in row:
                raise DataError(
                    f"{place}: expected a field {key!r} ({self.format} data), found {', '.join(map(str, row))}"
                    f"{_separated(row)}; say where it stands with `fields: {{{name}: …}}`"
                )
            if row[key] is None:
                wanted = f"expected a value in the field {key!r} ({self.format} data), found null"
                raise DataError(f"{place}: {wanted}; give it one, or leave the record out")
            record[name] = _checked(name, row[key], place)
        _check_tags(record, place)
        return record

    def _infer(self, row: Record, place: str) -> str:
        for format, names in kinds.FIELDS.items():
            if all(self.fields.get(name, name) in row for name in names):
                return format
        known = "; ".join(f"{format}: {', '.join(names)}" for format, names in kinds.FIELDS.items())
        found = f"found the fields {', '.join(map(str, row))}{_separated(row)}"
        mapped = "`fields: {prompt: …, completion: …}` beside the source says what they are called here"
        raise DataError(f"{place}: {found}, expected those of a format ({known}); {mapped}")


def _checked(name: str, value: Any, place: str) -> Any:
    if name == "label":
        return value if isinstance(value, str) else str(value)
    if name in ("tokens", "tags"):
        return _words(name, value, place)
    if name == "answer":
        return _answers(value, place)
    if name == "messages":
        good = (
            isinstance(value, list)
            and value
            and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in value
            )
        )
        if not good:
            raise DataError(f"{place}: expected `messages` as a list of {{role, content}}, found {str(value)[:80]!r}")
        return [{"role": m["role"], "content": m["content"]} for m in value]
    if name == "text" and isinstance(value, list) and value:
        return _transcript(value, place)
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text in {name!r}, found {type(value).__name__} {str(value)[:60]!r}")
    return value


def _words(name: str, value: Any, place: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and word for word in value):
        raise DataError(f"{place}: expected a list of words in {name!r}, found {str(value)[:60]!r}")
    return list(value)


def _check_tags(record: Record, place: str) -> None:
    if "tags" in record and len(record["tags"]) != len(record["tokens"]):
        found = f"{len(record['tokens'])} tokens and {len(record['tags'])} tags"
        raise DataError(f"{place}: expected a tag for each token, found {found}")


def _answers(value: Any, place: str) -> list[str]:
    """The acceptable answers: a text, a list of them, or a mapping with `text` as SQuAD has it."""
    texts = value.get("text") if isinstance(value, dict) else value
    texts = [texts] if isinstance(texts, str) else texts
    if isinstance(texts, list):
        texts = [entry.get("text") if isinstance(entry, dict) else entry for entry in texts]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"{place}: expected an answer, or a list of acceptable ones, found {str(value)[:60]!r}")
    return texts


def _transcript(turns: list[Any], place: str) -> str:
    """A list of lines, or of [speaker, line] pairs, as text: a line each, the speaker before a colon."""
    lines = []
    for turn in turns:
        parts = turn if isinstance(turn, list) else [turn]
        if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
            raise DataError(f"{place}: expected lines or [speaker, line] pairs in 'text', found {str(turn)[:60]!r}")
        lines.append(": ".join(parts))
    return "\n".join(lines)
