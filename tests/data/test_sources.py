"""Sources read what they say, and say where they cannot."""

import csv
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from graft import data
from graft.data.corpus import text_of
from graft.data.library import docstrings
from graft.data.sources import library_files
from graft.errors import DataError, SettingsError, UnknownName

ROWS = [{"text": f"document {n}, ünïcode"} for n in range(40)]


def corpus(raw, root=Path(), name="set"):
    return data.open_corpus({name: data.parse(raw)}, name, root)


def everything(raw, root=Path()):
    """All records of all splits."""
    found = []
    for split in data.SPLITS:
        try:
            found += corpus(raw, root).records(split)
        except DataError as error:
            if "expected at least one document, found none" not in str(error):
                raise
    return found


def test_the_librarys_code_is_its_files():
    found = everything({"source": "python-library", "packages": ["json"]})
    files = {path.read_text() for name, path in library_files([]) if name.startswith("json/")}
    assert {record["text"] for record in found} == {text for text in files if text.strip()}


@pytest.mark.parametrize("package", ["json", "xml.etree", "json.decoder", "textwrap"])
def test_a_package_is_the_files_of_its_name_in_the_whole_library(package):
    inside = package.replace(".", "/")
    whole = library_files([])
    wanted = [(name, path) for name, path in whole if name == f"{inside}.py" or name.startswith(f"{inside}/")]
    assert library_files([package]) == wanted != []
    assert library_files([package, package, "html"]) == sorted([*wanted, *library_files(["html"])])


def test_the_librarys_docstrings_are_its_prose():
    found = {
        record["text"]
        for record in everything({"source": "python-library", "keep": "docstrings", "packages": ["json"]})
    }
    assert any(text.startswith("JSON (JavaScript Object Notation)") for text in found)
    assert all(len(text) >= 80 for text in found)


def test_docstrings_are_taken_from_modules_classes_and_functions():
    long = "x" * 80
    code = f'"""A {long}"""\nclass C:\n    """B {long}"""\n    def f(self):\n        """short"""\n        "no {long}"\n'
    assert [text[0] for text in docstrings(code)] == ["A", "B"]


@pytest.mark.parametrize("package", ["jason", "", "..", "/etc", "json.", "test.support", "site-packages", "idlelib"])
def test_a_package_that_is_not_there_is_named(package):
    opened = corpus({"source": "python-library", "packages": [package]})
    with pytest.raises(DataError, match=re.escape(repr(package))):
        list(opened.records("train"))


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_jsonl_is_read_plain_and_compressed(tmp_path, ending):
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    pack = {"": lambda b: b, ".gz": gzip.compress, ".xz": lzma.compress}[ending]
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(content))
    found = everything({"source": "jsonl", "path": f"a.jsonl{ending}"}, tmp_path)
    assert sorted(map(text_of, found)) == sorted(map(text_of, ROWS))


def test_csv_and_tsv_are_read_with_quotes_and_lines_inside(tmp_path):
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["body", "class"])
            writer.writerow(["one, two\nthree", "x"])
            writer.writerow(['said "no"', "y"])
        raw = {"source": "csv", "path": name, "fields": {"text": "body", "label": "class"}}
        found = everything(raw, tmp_path)
        assert {(r["text"], r["label"]) for r in found} == {("one, two\nthree", "x"), ('said "no"', "y")}


def test_a_long_document_in_one_field_of_a_csv_is_read(tmp_path):
    long = "word " * 60_000
    (tmp_path / "a.csv").write_text(f"text\n{long}\n")
    assert [r["text"] for r in everything({"source": "csv", "path": "a.csv"}, tmp_path)] == [long]


def test_a_pair_of_surrogates_is_one_letter(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert [r["text"] for r in everything({"source": "jsonl", "path": "a.jsonl"}, tmp_path)] == ["😀"]


def test_parquet_is_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert len(everything({"source": "parquet", "path": "a.parquet"}, tmp_path)) == len(ROWS)


def test_a_folder_of_text_is_a_document_a_file_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a.txt", "skip.bin"):
        (tmp_path / name).write_text(f"text of {name}")
    raw = {"source": "text", "train": str(tmp_path)}
    assert [r["text"] for r in corpus(raw).records("train")] == ["text of a.txt", "text of b.txt"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"document": "file"}, ["one\ntwo\n\nthree\n---\nfour"]),
        ({"document": "line"}, ["one", "two", "three", "---", "four"]),
        ({"document": "paragraph"}, ["one\ntwo", "three\n---\nfour"]),
        ({"separator": "---"}, ["one\ntwo\n\nthree", "four"]),
    ],
)
def test_what_a_document_is(tmp_path, settings, expected):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n---\nfour\n")
    found = corpus({"source": "text", "train": str(tmp_path / "a.txt"), **settings}).records("train")
    assert [record["text"].strip("\n") for record in found] == expected


@pytest.mark.parametrize(
    ("name", "content", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', {}, r"a.jsonl, line 2: expected a JSON object"),
        ("a.jsonl", b'{"text": "fine"}\n[1, 2]\n', {}, r"line 2: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', {}, r"line 2: expected a field 'text'"),
        ("a.jsonl", b'{"text": 7}\n', {}, r"line 1: expected text in 'text', found int"),
        ("a.jsonl", b'{"body": 7}\n', {}, r"found the fields body, expected those of a format .*; `fields: {"),
        ("a.jsonl", b"", {}, r"found an empty file"),
        ("a.jsonl", b'{"text": "a\x00b"}\n', {}, r"line 1: expected text, found binary data"),
        ("a.jsonl", b'{"text": "fine"}\n\xff\xfe\n', {}, r"line 2: expected UTF-8 text, found byte 0xff"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "a\\ud800b"}\n', {}, r"line 2: .* found \\ud800, half of a surrogate"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 999, mtime=0)[:40], {}, r"damaged or cut short"),
        ("a.jsonl.xz", b"no xz", {}, r"damaged or cut short"),
        ("a.csv", b"text,label\na,b\nc\n", {"source": "csv"}, r"line 3: expected 2 values as in the header, found 1"),
        ("a.parquet", b"no parquet", {"source": "parquet"}, r"expected a parquet file"),
        (
            "a.parquet.gz",
            gzip.compress(b"PAR1", mtime=0),
            {"source": "parquet"},
            r"packed inside, found a .gz; unpack it",
        ),
        ("a.parquet.xz", lzma.compress(b"PAR1"), {"source": "parquet"}, r"packed inside, found a .xz; unpack it"),
        (
            "a.jsonl",
            b'{"text": "a", "label": null}\n',
            {},
            r"line 1: expected a value in the field 'label' \(labelled data\), found null",
        ),
        ("a.jsonl", b"\n  \n", {}, r"expected records, found nothing but white space"),
        ("a.csv", b"text,label\n", {"source": "csv"}, r"expected records, found no row below a header"),
        ("a.csv", b"text;label\na;b\n", {"source": "csv"}, r"found the fields text;label \(one name: .* by ';'\?"),
        ("a.csv", b"text;label\na, b;c\n", {"source": "csv"}, r"line 2: expected 1 values .* separated by ';'\?"),
        ("a.csv", b"body;label\na;c\n", {"source": "csv", "format": "text"}, r"'text' .* separated by ';'\?"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', {}, r"line 1: expected `messages` as a list"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path, name, content, raw, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(corpus({"source": "jsonl", "path": name, **raw}, tmp_path).records("train"))


def test_an_empty_text_file_is_named(tmp_path):
    for content, found in (("", "an empty file"), ("\n \n", "nothing but white space")):
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(DataError, match=rf"a.txt: expected text, found {found}"):
            list(corpus({"source": "text", "path": "a.txt"}, tmp_path).records("train"))


def test_records_that_are_read_as_one_text_are_told_their_source(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    with pytest.raises(DataError, match=r"1 distinct document.*; a.jsonl.gz is read as plain text: `source: jsonl`"):
        list(corpus({"source": "text", "path": "a.jsonl.gz"}, tmp_path).records("dev"))


def test_files_that_a_folder_holds_and_nobody_reads_are_told(tmp_path):
    (tmp_path / "code" / "deep").mkdir(parents=True)
    (tmp_path / "code" / "notes.rst").write_text("one text\n")
    for name in ("a.py", "deep/b.py"):
        (tmp_path / "code" / name).write_text("x = 1\n")
    settings = data.parse({"source": "text", "path": "code"})
    assert data.misread(settings, tmp_path) == (
        "of code only files ending in .txt, .text, .md, .rst are read (1); `code/**/*.py` names the 2 that end in .py"
    )
    assert data.misread(data.parse({"source": "text", "path": "code/**/*.py"}), tmp_path) == ""
    (tmp_path / "code" / "more.md").write_text("another\n")
    assert data.misread(settings, tmp_path) == ""


def test_a_file_that_is_not_there_is_named_before_anything_is_read(tmp_path):
    (problem,) = data.problems(data.parse({"source": "text", "path": "nothing.txt"}), tmp_path)
    assert "nothing.txt" in problem
    assert "relative to the recipe's folder" in problem


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        ({"source": "jsonl", "pth": "x"}, SettingsError, "did you mean 'path'"),
        ({"source": "jsonI", "path": "x"}, UnknownName, "did you mean 'jsonl'"),
        ({"source": "jsonl"}, SettingsError, "expected `path`"),
        ({"source": "jsonl", "path": "a", "train": "b"}, SettingsError, "found both"),
        ({"mix": {"a": 0}}, SettingsError, "above 0"),
        ({"path": "x"}, SettingsError, "expected `source:` or `mix:`"),
        ({"source": "text", "path": "x", "splits": {"dev": 0.6, "test": 0.5}}, SettingsError, "dev \\+ test below 1"),
    ],
)
def test_wrong_settings_say_what_is_right(raw, error, message):
    with pytest.raises(error, match=message):
        data.parse(raw)


def test_formats_are_inferred_from_the_fields(tmp_path):
    records = {
        "text": {"text": "a"},
        "labelled": {"text": "a", "label": 3},
        "completion": {"prompt": "a", "completion": "b"},
        "pairs": {"source": "a", "target": "b"},
        "chat": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    }
    for format, record in records.items():
        (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
        assert corpus({"source": "jsonl", "path": "a.jsonl"}, tmp_path).format == format


def test_records_without_any_text_are_no_documents(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": ""}\n{"text": "words"}\n{"text": " "}\n{"text": ""}\n')
    assert [record["text"] for record in everything({"source": "jsonl", "path": str(path)})] == ["words", " "]
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text('{"text": "", "label": "none"}\n')
    assert everything({"source": "jsonl", "path": str(labelled)}) == [{"text": "", "label": "none"}]


def test_a_file_of_records_that_are_all_empty_is_refused_before_anything_is_read_whole(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n' * 3)
    settings = data.parse({"source": "jsonl", "path": str(path)})
    assert data.problems(settings, tmp_path) == [
        f"{path}: expected text, found records whose text is empty, all of them"
    ]
