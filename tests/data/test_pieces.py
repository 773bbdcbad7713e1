"""Less of a data set: long texts in pieces that are never in two splits, and the first documents of each group."""

from __future__ import annotations

from graft.data import open_corpus, parse


def corpus_of(folder, texts, **more):
    for index, text in enumerate(texts):
        (folder / f"{index}.txt").write_text(text)
    return open_corpus({"books": parse({"source": "text", "path": "*.txt", **more})}, "books", folder)


def test_pieces_end_at_lines_and_join_to_the_text(tmp_path):
    text = "".join(f"line {i} {'x' * (i % 7)}\n" for i in range(50)) + "end"
    corpus = corpus_of(tmp_path, [text], pieces=60, splits={"dev": 0, "test": 0})
    found = [record["text"] for record in corpus.records("train")]
    assert "".join(found) == text
    assert all(60 <= len(piece) <= 60 + 15 and piece.endswith("\n") for piece in found[:-1])


def test_a_short_text_stays_whole(tmp_path):
    corpus = corpus_of(tmp_path, ["one\ntwo\n"], pieces=60, splits={"dev": 0, "test": 0})
    assert [record["text"] for record in corpus.records("train")] == ["one\ntwo"]


def test_all_pieces_of_a_text_are_in_one_split(tmp_path):
    texts = [f"book {i}\n" * 40 for i in range(30)]
    corpus = corpus_of(tmp_path, texts, pieces=50, splits={"dev": 0.3, "test": 0.3})
    books = {split: {r["text"].split("\n")[0] for r in corpus.records(split)} for split in ("train", "dev", "test")}
    assert sum(len(found) for found in books.values()) == len(set().union(*books.values())) == 30


def test_pieces_change_the_fingerprint(tmp_path):
    assert corpus_of(tmp_path, ["a\n" * 50]).fingerprint != corpus_of(tmp_path, ["a\n" * 50], pieces=10).fingerprint


def test_the_limit_holds_for_each_group_of_files(tmp_path):
    for name in ("most", "held-out"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(20)))
    settings = {"source": "text", "document": "line", "path": "most.txt", "test": "held-out.txt", "limit": 5}
    corpus = open_corpus({"lines": parse({**settings, "splits": {"dev": 0}})}, "lines", tmp_path)
    assert [r["text"] for r in corpus.records("train")] == [f"most {i}" for i in range(5)]
    assert [r["text"] for r in corpus.records("test")] == [f"held-out {i}" for i in range(5)]
