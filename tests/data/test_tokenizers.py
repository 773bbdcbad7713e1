"""Whatever the algorithm, every text comes back exactly."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft import data
from graft.data.encode import encode
from graft.data.tokenizers import SENTINELS, train_tokenizer
from graft.errors import SettingsError

SPECIAL = ("<s>", "</s>", "<pad>", "<mask>")
ALGORITHMS = ("bpe", "unigram", "wordpiece")


@pytest.fixture(scope="module")
def corpus():
    return data.open_corpus({"c": data.parse({"source": "python-library", "packages": ["json", "html"]})}, "c", Path())


@pytest.fixture(scope="module")
def trained(corpus):
    return {name: train_tokenizer(corpus, name, 800) for name in ALGORITHMS}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.text(max_size=9) | st.sampled_from(SPECIAL), max_size=5).map("".join))
def test_every_text_comes_back(trained, algorithm, text):
    (ids,) = encode([text], trained[algorithm])
    assert trained[algorithm].decode(ids) == text
    assert not set(ids) & set(trained[algorithm].all_special_ids)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_long_texts_that_name_special_tokens_come_back(trained, algorithm, monkeypatch):
    monkeypatch.setattr("graft.data.encode.PIECE", 300)
    monkeypatch.setattr("graft.data.encode.OVERLAP", 100)
    text = "".join(f"a line {n} of text {SPECIAL[n % 4]} and more\n" for n in range(60))
    (ids,) = encode([text], trained[algorithm])
    assert trained[algorithm].decode(ids) == text
    assert not set(ids) & set(trained[algorithm].all_special_ids)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_words_never_seen_and_marks_of_other_tokenizers_come_back(trained, algorithm):
    text = "qzxjv 漢字 😀 ##x ▁ Ġword  two  spaces \n\t don't\r\n"
    assert trained[algorithm].decode(trained[algorithm](text)["input_ids"]) == text


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_finds_longer_tokens_than_bytes(trained, corpus, algorithm):
    text = next(iter(corpus.records("train")))["text"]
    assert len(trained[algorithm](text)["input_ids"]) < 0.7 * len(text)
    assert len(trained[algorithm]) <= 800


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_corpus_gives_the_same_tokenizer(trained, corpus, algorithm):
    again = train_tokenizer(corpus, algorithm, 800)
    assert again.backend_tokenizer.to_str() == trained[algorithm].backend_tokenizer.to_str()


def test_it_saves_and_loads(trained, tmp_path):
    from graft import models

    trained["bpe"].save_pretrained(tmp_path)
    loaded = models.load_tokenizer(tmp_path)
    assert loaded("def f(x):")["input_ids"] == trained["bpe"]("def f(x):")["input_ids"]
    assert loaded.chat_template == trained["bpe"].chat_template


def test_sentinels_are_there_when_asked_for(corpus):
    tokenizer = train_tokenizer(corpus, "bpe", 600, sentinels=True)
    assert all(len(tokenizer(s)["input_ids"]) == 1 for s in SENTINELS)


def test_a_vocabulary_too_small_for_all_bytes_is_refused(corpus):
    with pytest.raises(SettingsError, match=r"at least 260 tokens for all bytes, .*found 100"):
        train_tokenizer(corpus, "bpe", 100)
