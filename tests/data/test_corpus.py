"""Splits never share a document; fingerprints change with the content; mixtures keep their shares."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft import data
from graft.data.corpus import drawn, identity_of, text_of
from graft.errors import DataError, UnknownName


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def opened(path, **more):
    return data.open_corpus({"set": data.parse({"source": "jsonl", "path": str(path), **more})}, "set", Path())


def split_texts(corpus):
    found = {}
    for split in data.SPLITS:
        try:
            found[split] = [record["text"] for record in corpus.records(split)]
        except DataError:
            found[split] = []
    return found


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=60))
def test_every_distinct_document_is_in_exactly_one_split(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "a.jsonl"
    write(path, texts)
    splits = split_texts(opened(path, splits={"dev": 0.3, "test": 0.3}))
    together = [text for part in splits.values() for text in part]
    assert sorted(together) == sorted(set(texts))


def test_a_document_stays_in_its_split_when_others_are_added(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [f"text {n}" for n in range(200)])
    before = split_texts(opened(path))
    write(path, [f"new {n}" for n in range(100)] + [f"text {n}" for n in range(200)])
    after = split_texts(opened(path))
    assert all(set(before[split]) <= set(after[split]) for split in before)


def test_shares_are_about_what_was_asked(tmp_path):
    write(tmp_path / "a.jsonl", [f"text {n}" for n in range(4000)])
    splits = split_texts(opened(tmp_path / "a.jsonl", splits={"dev": 0.1, "test": 0.2}))
    assert len(splits["dev"]) == pytest.approx(400, abs=80)
    assert len(splits["test"]) == pytest.approx(800, abs=100)


def test_a_given_test_split_stays_whole_and_train_loses_what_it_shares(tmp_path):
    write(tmp_path / "train.jsonl", ["a", "b", "c"])
    write(tmp_path / "test.jsonl", ["b", "d"])
    raw = {"source": "jsonl", "train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    raw["splits"] = {"dev": 0.0}
    splits = split_texts(data.open_corpus({"s": data.parse(raw)}, "s", Path()))
    assert splits == {"train": ["a", "c"], "dev": [], "test": ["b", "d"]}


def test_one_document_cannot_be_split(tmp_path):
    write(tmp_path / "a.jsonl", ["alone"])
    empty = [split for split, texts in split_texts(opened(tmp_path / "a.jsonl")).items() if not texts]
    assert len(empty) == 2
    with pytest.raises(DataError, match="1 distinct document, split by hash; give it more"):
        list(opened(tmp_path / "a.jsonl").records(empty[0]))


def test_the_fingerprint_follows_content_and_settings_not_the_place(tmp_path):
    write(tmp_path / "a.jsonl", ["x", "y"])
    first = opened(tmp_path / "a.jsonl").fingerprint
    (tmp_path / "moved").mkdir()
    write(tmp_path / "moved" / "b.jsonl", ["x", "y"])
    assert opened(tmp_path / "moved" / "b.jsonl").fingerprint == first
    assert opened(tmp_path / "a.jsonl", limit=1).fingerprint != first
    write(tmp_path / "a.jsonl", ["x", "z"])
    assert opened(tmp_path / "a.jsonl").fingerprint != first


def test_the_fingerprint_says_which_file_feeds_which_split(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", [name])
    place = {name: str(tmp_path / f"{name}.jsonl") for name in "abc"}

    def fingerprint(**splits):
        return data.open_corpus({"s": data.parse({"source": "jsonl", **splits})}, "s", Path()).fingerprint

    two_in_train = fingerprint(test=[place["a"]], train=[place["b"], place["c"]])
    assert two_in_train != fingerprint(test=[place["a"], place["b"]], train=[place["c"]])
    assert two_in_train == fingerprint(train=[place["b"], place["c"]], test=place["a"])


def test_mixtures_of_mixtures_multiply_their_shares(tmp_path):
    write(tmp_path / "a.jsonl", ["x"])
    source = {"source": "jsonl", "path": str(tmp_path / "a.jsonl")}
    raw = {"a": source, "b": source, "c": source, "ab": {"mix": {"a": 1, "b": 3}}, "all": {"mix": {"ab": 1, "c": 1}}}
    sets = {name: data.parse(value) for name, value in raw.items()}
    shares = {part.name: share for part, share in data.open_corpus(sets, "all", Path()).parts}
    assert shares == pytest.approx({"a": 0.125, "b": 0.375, "c": 0.5})


@pytest.mark.parametrize(("temperature", "expected"), [(1, 0.8), (2, 2 / 3), (1e9, 0.5)])
def test_temperature_evens_the_shares_out(temperature, expected):
    mixture = data.parse({"mix": {"a": 4, "b": 1}, "temperature": temperature})
    assert mixture.probabilities()["a"] == pytest.approx(expected)


def test_a_split_that_does_not_exist_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UnknownName, match="did you mean 'train'"):
        list(opened(tmp_path / "a.jsonl").records("trian"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=3), max_size=40), st.integers(1, 12))
def test_a_draw_is_that_of_sorting_all_by_their_hashes_and_grows_with_its_limit(texts, limit):
    records = [{"text": text} for text in texts]
    found = drawn(iter(records), limit)
    cut = sorted(range(len(records)), key=lambda place: (identity_of(records[place]), place))[:limit]
    assert found == [records[place] for place in sorted(cut)]
    assert all(record in drawn(records, limit + 1) for record in found)
    assert drawn(records, None) == records


def test_a_draw_takes_its_share_of_every_part():
    records = [{"text": f"{part} {n}"} for part in ("first", "second") for n in range(500)]
    found = [record["text"].split()[0] for record in drawn(records, 200)]
    # a binomial of 200 draws has a standard deviation of 7
    assert 70 < found.count("first") < 130


def test_references_name_a_split_or_mean_train():
    assert data.split_ref("mixed.dev") == ("mixed", "dev")
    assert data.split_ref("mixed") == ("mixed", "train")
    assert data.split_ref("v1.0") == ("v1.0", "train")


def test_describe_counts_what_is_there(tmp_path):
    write(tmp_path / "a.jsonl", [f"text {n}" for n in range(50)])
    corpus = opened(tmp_path / "a.jsonl")
    splits = corpus.describe()["splits"]
    assert sum(s["documents"] for s in splits.values()) == 50
    assert splits["train"]["characters"] == sum(len(text_of(r)) for r in corpus.records("train"))


def test_real_text_splits_without_overlap(shared_data):
    raw = {
        "source": "jsonl",
        "format": "text",
        "fields": {"text": "answer"},
        "path": str(shared_data / "lm_medical_en/train.jsonl.xz"),
        "limit": 3000,
    }
    splits = split_texts(data.open_corpus({"s": data.parse(raw)}, "s", Path()))
    assert not set(splits["train"]) & (set(splits["dev"]) | set(splits["test"]))
    assert len(splits["train"]) > 2000


@given(st.text(), st.text())
def test_the_identity_of_one_text_is_that_of_its_json(name, text):
    plain = json.dumps({name: text}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert identity_of({name: text}) == int.from_bytes(hashlib.sha256(plain).digest()[:8], "little")
