"""A long text gives the tokens that one call gives, however it is cut."""

import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graft import data
from graft.data import encode as room
from graft.data.encode import encode
from graft.data.sources import library_files
from graft.data.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def prose():
    return "".join(path.read_text() for name, path in library_files(["json", "email"]))


@pytest.fixture(scope="module")
def tokenizers(prose):
    corpus = data.open_corpus({"c": data.parse({"source": "python-library", "packages": ["json"]})}, "c", Path())
    made = {name: train_tokenizer(corpus, name, 800) for name in ("bpe", "unigram", "wordpiece")}
    return {**made, "sentencepiece": sentencepiece(prose)}


def sentencepiece(prose):
    """Words joined by ▁, one of them put before every text, nothing cut beforehand: as Llama's and T5's."""
    marked = re.sub(r"\s+", "▁", prose)
    count = Counter(re.findall("▁[^▁]*", marked))
    scores = {word: math.log(number / count.total()) for word, number in count.most_common(500)}
    scores |= {letter: -12.0 - place / 7 for place, letter in enumerate(sorted(set(marked)))}
    made = Tokenizer(models.Unigram([("<unk>", -99.0), *scores.items()], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(room, "PIECE", 500)
    monkeypatch.setattr(room, "OVERLAP", 200)
    monkeypatch.setattr(room, "AT_ONCE", 3)


def at_once(text, tokenizer):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "wordpiece", "sentencepiece"])
def test_real_text_in_pieces_has_the_tokens_of_one_call(tokenizers, prose, small, algorithm):
    tokenizer = tokenizers[algorithm]
    text = prose[:60_000]
    if algorithm == "sentencepiece":
        text = re.sub(" +", " ", text)  # 8 + 16 spaces and 16 + 8 are equally likely: rounding decides
    assert encode([text, "short", text[7:]], tokenizer) == [at_once(t, tokenizer) for t in (text, "short", text[7:])]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "wordpiece"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_any_text_in_pieces_has_the_tokens_of_one_call(tokenizers, small, algorithm, words, seed):
    text = "".join(random.Random(seed).choices([*words, " ", "\n", "the ", "  "], k=900))
    assert encode([text], tokenizers[algorithm]) == [at_once(text, tokenizers[algorithm])]


def test_where_pieces_cannot_agree_the_text_is_encoded_whole(tokenizers, small):
    text = "    " * 1000 + "x" + "ab" * 1000
    assert encode([text], tokenizers["bpe"]) == [at_once(text, tokenizers["bpe"])]


def test_pieces_of_real_size_agree_on_real_text(tokenizers, prose, monkeypatch):
    text = prose * (200_000 // len(prose) + 1)
    expected = at_once(text, tokenizers["bpe"])
    seams = []
    found = room._seam
    monkeypatch.setattr(room, "_seam", lambda *given: seams.append(found(*given)) or seams[-1])
    assert encode([text], tokenizers["bpe"]) == [expected]
    assert len(seams) == -(-len(text) // room.PIECE) - 1
    assert None not in seams
