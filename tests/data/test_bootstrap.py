"""A bootstrap resample has as many documents as there are, drawn with replacement; the manifest says which."""

import json
from collections import Counter

import numpy as np
import pytest

from graft import data
from graft.data.bootstrap import bootstrap_stream, described, times_drawn, weights_of
from graft.data.objective_rows import objective_rows
from graft.data.objectives import Causal, Span
from graft.data.stream import tokenize


def corpus_of(tmp_path, rows, name="set"):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"source": "jsonl", "train": str(path), "splits": {"dev": 0, "test": 0}}
    return data.open_corpus({name: data.parse(raw)}, name, tmp_path)


def documents(stream):
    return Counter(tuple(stream.document(place)[0].tolist()) for place in range(stream.documents))


def test_as_many_are_drawn_as_there_are_and_about_a_third_is_left_out():
    times = times_drawn(20_000, seed=1)
    assert times.sum() == 20_000
    # (1 - 1/n)^n is e^-1 for large n; the standard deviation of the share is 0.0022
    assert (times == 0).mean() == pytest.approx(np.exp(-1), abs=0.01)
    assert np.array_equal(times, times_drawn(20_000, seed=1))
    assert not np.array_equal(times, times_drawn(20_000, seed=2))
    assert not np.array_equal(times, times_drawn(20_000, seed=1, part=1))


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_the_stream_holds_every_document_as_often_as_it_was_drawn(tmp_path, letters, kind):
    rows = [{"text": f"{chr(97 + i)} and more"} for i in range(20)]
    if kind == "pairs":
        rows = [{"source": chr(97 + i) * 3, "target": chr(98 + i)} for i in range(20)]
    corpus = corpus_of(tmp_path, rows)
    plain = tokenize(corpus, "train", letters, tmp_path / "cache")
    found = bootstrap_stream(corpus, "train", letters, tmp_path / "cache", seed=3)
    times = times_drawn(20, seed=3)
    expected = {tuple(plain.document(i)[0].tolist()): int(n) for i, n in enumerate(times) if n}
    assert documents(found) == expected
    for place in range(found.documents):
        ids, trained = found.document(place)
        same = next(i for i in range(20) if np.array_equal(plain.document(i)[0], ids))
        assert np.array_equal(trained, plain.document(same)[1])
    again = bootstrap_stream(corpus, "train", letters, tmp_path / "cache", seed=3)
    assert np.array_equal(again.ids, found.ids)


def test_an_epoch_of_rows_trains_on_the_resample(tmp_path, letters):
    corpus = corpus_of(tmp_path, [{"text": chr(97 + i) * 6} for i in range(20)])
    rows = objective_rows(corpus, "train", letters, Causal(), length=16, seed=0, cache=tmp_path / "cache", bootstrap=4)
    read = np.concatenate([rows[i]["input_ids"][rows[i]["segments"] >= 0] for i in range(len(rows))])
    letters_read = Counter(read[read >= 100].tolist())
    assert letters_read == {100 + i: 6 * int(n) for i, n in enumerate(times_drawn(20, seed=4)) if n}


def test_answers_for_an_encoder_decoder_are_resampled_too(tmp_path, letters):
    corpus = corpus_of(tmp_path, [{"source": "x", "target": chr(97 + i)} for i in range(20)])
    rows = objective_rows(corpus, "train", letters, Span(), length=16, seed=0, cache=tmp_path / "cache", bootstrap=4)
    targets = Counter(int(rows[i]["labels"][0]) for i in range(len(rows)))
    assert targets == {100 + i: int(n) for i, n in enumerate(times_drawn(20, seed=4)) if n}


def test_the_manifest_says_how_often_each_document_of_each_part_was_drawn(tmp_path, letters):
    sets = {}
    for name in ("one", "two"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(30)))
        sets[name] = data.parse({"source": "jsonl", "train": str(path), "splits": {"dev": 0, "test": 0}})
    sets["both"] = data.parse({"mix": {"one": 0.5, "two": 0.5}})
    found = described(data.open_corpus(sets, "both", tmp_path), "train", letters, tmp_path / "cache", seed=9)
    found = json.loads(json.dumps(found))
    assert found["seed"] == 9
    for place, name in enumerate(("one", "two")):
        part, times = found["parts"][name], times_drawn(30, 9, place)
        assert (part["documents"], part["distinct"]) == (30, int((times > 0).sum()))
        assert np.array_equal(weights_of(part["weights"]), times)
