"""Labels stand where they belong: at the first token of a word, on the tokens of an answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft import data
from graft.data.encode import encode_with_places
from graft.data.examples import Encoder, LabelledCollate, labels_in
from graft.data.tokenizers import train_tokenizer
from graft.errors import DataError


@pytest.fixture(scope="module", params=["bpe", "unigram", "wordpiece"])
def tokenizer(request, tmp_path_factory):
    raw = data.parse({"source": "python-library", "packages": ["json"], "splits": {"dev": 0, "test": 0}})
    return train_tokenizer(data.open_corpus({"c": raw}, "c", tmp_path_factory.mktemp("t")), request.param, 600)


WORDS = st.lists(st.text("abcxyz.é東", min_size=1, max_size=7), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(words=WORDS, length=st.integers(6, 40))
def test_a_word_is_tagged_at_the_token_that_holds_its_first_character(tokenizer, words, length):
    record = {"tokens": words, "tags": [f"T{n}" for n in range(len(words))]}
    encoder = Encoder(tokenizer, length, record["tags"])
    ((row, tokens),) = encoder.tagged([record])
    ((_, places),) = encode_with_places([" ".join(words)], tokenizer)
    assert len(row["input_ids"]) == len(row["labels"]) <= length
    begin = 0
    for number, (word, token) in enumerate(zip(words, tokens, strict=True)):
        if token >= 0:
            first, last = places[token - len(encoder.start)]
            assert first <= begin < last
            before = [t for t in tokens[:number] if t == token]
            assert before or row["labels"][token] == number
        begin += len(word) + 1
    assert (row["labels"] >= 0).sum() == len({t for t in tokens if t >= 0})


def recovered(encoder, record):
    """The text under the labels of each window that holds the answer."""
    found = []
    for window in encoder.windows(record):
        assert len(window.row["input_ids"]) <= encoder.length
        if window.row["labels"].any():
            first, last = window.row["labels"] - window.first
            found.append(record["context"][window.places[first][0] : window.places[last][1]])
    return found


def test_an_answer_is_found_in_some_window_of_a_long_context(tokenizer):
    context = " ".join(f"thing {n} is here" for n in range(60)) + " and x marks it"
    for answer in ("thing 0", "thing 31 is", "x marks"):
        record = {"question": "which?", "context": context, "answer": [answer]}
        found = recovered(Encoder(tokenizer, 60), record)
        assert found
        assert all(answer in text and len(text) <= len(answer) + 12 for text in found)
    assert recovered(Encoder(tokenizer, 60), {**record, "answer": ["nowhere"]}) == []


def test_every_token_of_a_context_is_in_some_window(tokenizer):
    record = {"question": "q?", "context": "word " * 90, "answer": ["word"]}
    windows = Encoder(tokenizer, 40).windows(record)
    ((_, places),) = encode_with_places([record["context"]], tokenizer)
    assert {tuple(p) for window in windows for p in window.places} == {tuple(p) for p in places}


def test_a_question_that_leaves_no_room_is_refused(tokenizer):
    record = {"question": "word " * 40, "context": "c", "answer": ["c"]}
    with pytest.raises(DataError, match="leave room for a context within 16 tokens"):
        Encoder(tokenizer, 16).windows(record)


def test_labels_that_are_not_known_are_not_learned(tokenizer):
    records = [{"text": "a", "label": "x"}, {"text": "b c d", "label": "y"}]
    assert labels_in("classification", records) == ["x", "y"]
    rows = Encoder(tokenizer, 16, ["y", "z"]).classified(records)
    batch = LabelledCollate("classification", 0)(rows)
    assert batch["labels"].tolist() == [-100, 0]
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert np.array_equal(batch["input_ids"][1][: len(rows[1]["input_ids"])], rows[1]["input_ids"])


@pytest.mark.shared
def test_answers_of_real_questions_are_found(tokenizer, shared_data):
    raw = {"source": "jsonl", "path": "eval_xquad/en.test.jsonl.gz", "fields": {"answer": "answers"}, "limit": 40}
    corpus = data.open_corpus({"q": data.parse(raw)}, "q", shared_data)
    for record in corpus.records("train"):
        assert any(record["answer"][0] in text for text in recovered(Encoder(tokenizer, 512), record))
