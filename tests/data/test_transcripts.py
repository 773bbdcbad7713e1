"""A text that stands in its file as a list of turns is read as one text."""

from __future__ import annotations

import json

import pytest

from graft.data import open_corpus, parse
from graft.errors import DataError


def texts(folder, value) -> list[str]:
    (folder / "talks.jsonl").write_text(json.dumps({"turns": value}) + "\n")
    settings = {
        "source": "jsonl",
        "format": "text",
        "fields": {"text": "turns"},
        "train": "talks.jsonl",
        "splits": {"dev": 0, "test": 0},
    }
    corpus = open_corpus({"talks": parse(settings)}, "talks", folder)
    return [record["text"] for record in corpus.records("train")]


def test_pairs_are_written_a_line_each_with_the_speaker_first(tmp_path):
    assert texts(tmp_path, [["USER", "Hello"], ["SYSTEM", "Good day"]]) == ["USER: Hello\nSYSTEM: Good day"]


def test_lines_are_written_a_line_each(tmp_path):
    assert texts(tmp_path, ["one", "two"]) == ["one\ntwo"]


@pytest.mark.parametrize("turns", [[1, 2], [["a", "b", "c"]], [{"role": "user"}]])
def test_anything_else_is_refused_with_its_line(tmp_path, turns):
    with pytest.raises(DataError, match=r"line 1: expected lines or \[speaker, line\] pairs"):
        texts(tmp_path, turns)
