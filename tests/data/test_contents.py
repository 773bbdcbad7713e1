"""What a split is read from: the same files are known again under other settings, their other documents are not."""

import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft import data
from graft.data.contents import MOST, contents
from graft.data.corpus import identity_of, spans


def rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(split="train", **settings):
    raw = {"source": "jsonl", **settings}
    return contents(data.open_corpus({"d": data.parse(raw)}, "d", Path()), split)


def meet(one, other):
    found = {a.meets(b) for a in one for b in other} | {b.meets(a) for a in one for b in other}
    assert len(found) == 1
    return found.pop()


@pytest.fixture
def file(tmp_path):
    return str(rows(tmp_path / "a.jsonl", [f"line {n}" for n in range(50)]))


@given(dev=st.floats(0, 0.4), test=st.floats(0, 0.4), taken=st.sets(st.sampled_from(["dev", "test"])))
def test_spans_hold_the_documents_that_a_split_has(tmp_path_factory, dev, test, taken):
    folder = tmp_path_factory.mktemp("spans")
    some = {split: str(rows(folder / f"{split}.jsonl", [f"{split} {n}" for n in range(3)])) for split in taken}
    path = str(rows(folder / "a.jsonl", [f"line {n}" for n in range(60)]))
    settings = data.parse({"source": "jsonl", "path": path, **some, "splits": {"dev": dev, "test": test}})
    found = spans(settings, taken)
    for split, record in data.open_corpus({"d": settings}, "d", Path())._all():
        low, high = found[split]
        assert (low <= identity_of(record) / 2**64 < high) == record["text"].startswith("line")


def test_a_file_is_known_by_its_content_wherever_it_lies(tmp_path, file):
    moved = rows(tmp_path / "b.jsonl", [f"line {n}" for n in range(50)])
    other = rows(tmp_path / "c.jsonl", [f"line {n}" for n in range(49)])
    assert meet(read(path=file), read(path=str(moved)))
    assert not meet(read(path=file), read(path=str(other)))
    assert meet(read(path=file), read(path=[str(moved), str(other)]))


def test_the_same_documents_split_otherwise_meet_where_their_shares_do(file):
    trained = read(path=file, splits={"dev": 0.2, "test": 0.1})
    for split in ("dev", "test"):
        assert not meet(trained, read(split, path=file, splits={"dev": 0.2, "test": 0.1}))
        assert not meet(trained, read(split, path=file, limit=20, pieces=100, format="text", fields={"text": "text"}))
    assert meet(trained, read("dev", path=file, splits={"dev": 0.4, "test": 0.1}))
    assert meet(trained, read(path=file, splits={"dev": 0, "test": 0}))
    assert meet(trained, read("test", test=file, path=file))


def test_a_file_that_is_given_to_another_split_is_not_read(tmp_path, file):
    other = str(rows(tmp_path / "b.jsonl", ["other"]))
    assert not meet(read(train=other, dev=file), read(path=file, splits={"dev": 0, "test": 0}))
    assert meet(read("dev", train=other, dev=file), read(path=file, splits={"dev": 0, "test": 0}))


def test_files_cut_into_other_documents_meet_in_every_split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree\nfour\n")
    raw = {"source": "text", "path": str(path)}
    assert meet(read(**raw, document="paragraph"), read("test", **raw, document="line"))
    assert not meet(read(**raw, document="line"), read("test", **raw, document="line"))


def test_of_very_many_files_those_with_the_lowest_hashes_are_noted(tmp_path):
    for n in range(3 * MOST):
        (tmp_path / f"{n}.txt").write_text(f"text {n}")
    (found,) = read(source="text", path=str(tmp_path / "*.txt"))
    (half,) = read(source="text", path=str(tmp_path / "*[02468].txt"))
    assert len(found.files) == len(half.files) == MOST
    assert found.meets(half)


def test_the_library_is_another_text_where_other_parts_of_it_are_kept():
    def library(keep, split="train"):
        return read(split, source="python-library", packages=["json"], keep=keep)

    assert meet(library("code"), read("train", source="python-library", packages=["json", "email"], keep="code"))
    assert not meet(library("code"), library("docstrings"))
    assert not meet(library("code"), library("code", "dev"))


def test_a_mixture_is_read_from_all_its_parts(tmp_path, file):
    other = str(rows(tmp_path / "b.jsonl", ["x", "y"]))
    raw = {
        "a": {"source": "jsonl", "path": file},
        "b": {"source": "jsonl", "path": other},
        "m": {"mix": {"a": 1, "b": 1}},
    }
    sets = {name: data.parse(value) for name, value in raw.items()}
    found = contents(data.open_corpus(sets, "m", Path()), "train")
    assert [any(content.meets(one) for content in found) for one in [*read(path=file), *read(path=other)]] == [True] * 2


def repeat(one, other):
    found = {a.repeats(b) for a in one for b in other} | {b.repeats(a) for a in one for b in other}
    assert len(found) == 1
    return found.pop()


def test_documents_are_known_again_in_files_of_another_kind(tmp_path, file):
    texts = [f"line {n}" for n in range(50)]
    packed, table, lines = tmp_path / "a.jsonl.xz", tmp_path / "a.csv", tmp_path / "a.txt"
    packed.write_bytes(lzma.compress(Path(file).read_bytes()))
    table.write_text("body\n" + "".join(f"{text}\n" for text in texts))
    lines.write_text("".join(f"{text}\n" for text in texts))
    kinds = [
        {"path": str(packed)},
        {"source": "csv", "path": str(table), "fields": {"text": "body"}},
        {"source": "text", "path": str(lines), "document": "line"},
    ]
    trained = read(path=file)
    for other in kinds:
        assert not meet(trained, read(**other))
        assert repeat(trained, read(**other))
        for split in ("dev", "test"):  # the same documents are in the same split
            assert not repeat(trained, read(split, **other))
        assert repeat(trained, read("dev", **other, splits={"dev": 0.5, "test": 0}))


def test_many_documents_are_compared_where_both_have_marks(tmp_path):
    many = str(rows(tmp_path / "a.jsonl", [f"line {n}" for n in range(900)]))
    whole = {"splits": {"dev": 0, "test": 0}}
    for shared, found in ((300, True), (5, False), (0, False)):
        other = str(rows(tmp_path / "b.jsonl", [f"line {n}" if n < shared else f"other {n}" for n in range(400)]))
        assert repeat(read(path=many, **whole), read(path=other, **whole)) == found


def test_a_single_document_and_a_few_short_lines(tmp_path):
    whole = {"splits": {"dev": 0, "test": 0}}
    novel, copy = (rows(tmp_path / name, ["a novel"]) for name in ("n.jsonl", "c.jsonl"))
    copy.write_text('{"text": "a novel", "year": 1900}\n')
    assert repeat(read(path=str(novel), **whole), read(path=str(copy), **whole))
    talk, other = (rows(tmp_path / f"{n}.jsonl", ["Yes.", *(f"{n} says {i}" for i in range(40))]) for n in "ab")
    assert not repeat(read(path=str(talk), **whole), read(path=str(other), **whole))
