"""What the first records of a data set tell: which splits are empty, where there are no more."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft import data
from graft.data import heads
from graft.errors import DataError


def corpus_of(path, texts, **more):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return data.open_corpus({"s": data.parse({"source": "jsonl", "path": str(path), **more})}, "s", path.parent)


def empty(corpus, split):
    try:
        return not list(corpus.records(split))
    except DataError as error:
        return str(error)


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=40),
    splits=st.sets(st.sampled_from(data.SPLITS)),
)
def test_of_a_small_data_set_the_empty_splits_are_told_as_when_they_are_read(texts, splits, tmp_path_factory):
    corpus = corpus_of(tmp_path_factory.mktemp("head") / "a.jsonl", texts, splits={"dev": 0.2, "test": 0.2})
    told = {split: empty(corpus, split) for split in splits}
    assert set(corpus.lacking(splits)) == {message for message in told.values() if message}


@pytest.mark.parametrize(("name", "most"), [("RECORDS", 50), ("CHARACTERS", 400)])
def test_of_a_data_set_that_goes_on_behind_its_head_nothing_is_told(tmp_path, monkeypatch, name, most):
    corpus = corpus_of(tmp_path / "a.jsonl", [f"text {n:03}" for n in range(100)], splits={"dev": 0, "test": 0})
    assert len(corpus.lacking({"dev", "test"})) == 2
    monkeypatch.setattr(heads, name, most)
    assert corpus.lacking({"dev", "test"}) == []
    assert [record["text"] for _, record in corpus.first()] == [f"text {n:03}" for n in range(50)]


def test_reading_ends_where_all_splits_have_been_seen(tmp_path, monkeypatch):
    corpus = corpus_of(tmp_path / "a.jsonl", [f"text {n}" for n in range(100)])
    read = []
    original = heads.sources.read
    monkeypatch.setattr(heads.sources, "read", lambda *given: (read.append(row) or row for row in original(*given)))
    assert corpus.lacking({"train"}) == []
    assert len(read) < 10
