"""How much text a data set has, told without reading it, against reading it."""

import gzip
import json
from pathlib import Path

import pytest

from graft import data
from graft.data.amount import text_bytes
from graft.data.corpus import text_of


def opened(**sets):
    return data.open_corpus({name: data.parse(raw) for name, raw in sets.items()}, next(iter(sets)), Path())


def found(corpus, split):
    return sum(len(text_of(record).encode()) for record in corpus.records(split))


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"this is line {n:05}\n" for n in range(4000)))
    return path


@pytest.mark.parametrize("split", data.SPLITS)
def test_the_size_of_a_split_is_its_share_of_the_files(lines, split):
    corpus = opened(d={"source": "text", "document": "line", "path": str(lines), "splits": {"dev": 0.3, "test": 0.1}})
    # which lines go where is chance: of 400 lines 20 more or less
    assert text_bytes(corpus, split) == pytest.approx(found(corpus, split), rel=0.2)


def test_a_split_of_its_own_takes_nothing_from_the_rest_and_gives_nothing(lines, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("held out\n" * 10)
    corpus = opened(d={"source": "text", "path": str(lines), "test": str(own), "splits": {"dev": 0}})
    assert text_bytes(corpus, "test") == own.stat().st_size
    assert text_bytes(corpus, "train") == lines.stat().st_size


def test_a_limited_data_set_has_as_many_documents_as_its_first_are_long(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 100, "more": n}) + "\n" for n in range(900)))
    corpus = opened(d={"source": "jsonl", "path": str(path), "fields": {"text": "text"}, "limit": 200})
    assert text_bytes(corpus, "train") == pytest.approx(0.9 * 200 * 100)


def test_a_mixture_has_what_its_parts_have_and_packed_files_more_than_they_show(lines):
    packed = lines.with_name("lines.txt.gz")
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    one = {"source": "text", "path": str(lines)}
    both = opened(m={"mix": {"a": 1, "b": 1}}, a=one, b={"source": "text", "path": str(packed)})
    alone = [text_bytes(part, "train") for part, _ in both.parts]
    assert text_bytes(both, "train") == sum(alone)
    assert alone[1] > 0.9 * packed.stat().st_size


@pytest.mark.parametrize("keep", ["code", "docstrings", "tokens", "packages"])
def test_what_is_kept_of_some_packages_is_within_a_factor_of_two_and_a_half_of_the_whole_librarys_share(keep):
    corpus = opened(d={"source": "python-library", "keep": keep, "packages": ["json", "email", "logging"]})
    assert 0.4 < text_bytes(corpus, "train") / found(corpus, "train") < 2.5
