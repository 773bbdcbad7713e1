"""Packing wastes nothing, loses nothing and mixes exactly."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graft.data.packing import RunningText, WholeDocuments, best_fit, pack
from graft.data.rows import ListRows
from graft.data.stream import TokenStream


def stream_of(lengths, first=10):
    """Documents of these lengths; no token occurs twice."""
    ids = np.arange(first, first + sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenStream(ids, offsets, None)


def answers_of(lengths, answers):
    """Documents of which the last tokens, as many as `answers` says, are trained on."""
    stream = stream_of(lengths)
    trained = np.zeros(sum(lengths), np.uint8)
    for end, count in zip(stream.offsets[1:], answers, strict=True):
        trained[end - count : end] = 1
    return TokenStream(stream.ids, stream.offsets, trained)


def tokens(row):
    return row["input_ids"][row["segments"] >= 0]


documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(lengths=documents, length=st.integers(2, 24), seed=st.integers(0, 5))
def test_running_text_reads_every_token_once_an_epoch(lengths, length, seed):
    rows = RunningText(stream_of(lengths), length, seed)
    for epoch in range(2):
        read = np.concatenate([tokens(rows[epoch * len(rows) + i]) for i in range(len(rows))])
        assert sorted(read) == list(range(10, 10 + sum(lengths)))


@settings(max_examples=60, deadline=None)
@given(lengths=documents, length=st.integers(2, 24))
def test_every_row_of_running_text_is_full_but_one(lengths, length):
    rows = RunningText(stream_of(lengths), length, 0)
    padded = sum(length - len(tokens(rows[i])) for i in range(len(rows)))
    assert padded == -sum(lengths) % length


@settings(max_examples=60, deadline=None)
@given(lengths=documents, length=st.integers(2, 24))
def test_segments_are_documents_and_positions_count_within_them(lengths, length):
    stream = stream_of(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows = RunningText(stream, length, 1)
    for i in range(len(rows)):
        row = rows[i]
        for segment in range(row["segments"].max() + 1):
            here = row["segments"] == segment
            assert len(set(owner[row["input_ids"][here] - 10])) == 1
            assert row["positions"][here].tolist() == list(range(here.sum()))
            assert not row["trained"][here][0]
            assert row["trained"][here][1:].all()


@settings(max_examples=60, deadline=None)
@given(lengths=documents, length=st.integers(2, 24))
def test_whole_documents_are_never_cut_apart(lengths, length):
    stream = stream_of(lengths)
    rows = WholeDocuments(stream, length, 0)
    seen = []
    for i in range(len(rows)):
        row = rows[i]
        for segment in range(row["segments"].max() + 1):
            ids = row["input_ids"][row["segments"] == segment]
            document = int(np.searchsorted(stream.offsets, ids[0] - 10, side="right")) - 1
            start, end = stream.offsets[document : document + 2]
            assert ids.tolist() == list(range(10 + start, 10 + min(end, start + length)))
            seen.append(document)
    assert sorted(seen) == [d for d, size in enumerate(lengths) if size > 1]


def test_a_document_with_nothing_to_train_on_within_a_row_is_left_out():
    rows = WholeDocuments(answers_of([10, 6], [2, 2]), 8, 0)
    assert len(rows) == 1
    assert tokens(rows[0]).tolist() == list(range(20, 26))


def test_best_fit_wastes_little_of_real_lengths():
    lengths = np.minimum(np.random.default_rng(0).lognormal(4, 0.8, 3000).astype(int) + 2, 512)
    bins = best_fit(lengths, 512, np.ones(3000, bool))
    assert sum(lengths) / (512 * len(bins)) > 0.99
    assert sorted(d for b in bins for d in b) == list(range(3000))
    assert all(lengths[b].sum() <= 512 for b in bins)


def test_rows_follow_from_seed_and_number_alone():
    make = lambda seed: pack([(stream_of([7] * 20), 0.5), (stream_of([5] * 9, 500), 0.5)], 8, seed, whole=False)  # noqa: E731
    first, again, other = make(0), make(0), make(1)
    for i in (40, 3, 17, 3, 2000, 0):
        assert first[i]["input_ids"].tolist() == again[i]["input_ids"].tolist()
    assert any(first[i]["input_ids"].tolist() != other[i]["input_ids"].tolist() for i in range(5))


def test_a_mixture_keeps_its_shares_exactly_over_every_block():
    rows = pack([(stream_of([8] * 40), 0.75), (stream_of([8] * 40, 1000), 0.25)], 8, 0, whole=False)
    for block in range(3):
        second = sum(rows[block * 1024 + i]["input_ids"][0] >= 1000 for i in range(1024))
        assert second == 256


@settings(max_examples=60, deadline=None)
@given(shares=st.lists(st.floats(1e-6, 1), min_size=2, max_size=6), blocks=st.integers(1, 12))
@example(shares=[0.3, 0.0002, 0.7], blocks=12)
@example(shares=[2, 0.0003, 1], blocks=12)
def test_a_mixture_of_any_shares_reads_every_part_in_order(shares, blocks):
    """Shares below one row in a block included: such a part gives a row now and then."""
    rows = pack([(stream_of([8], 10 + 8 * part), share) for part, share in enumerate(shares)], 8, 0, whole=False)
    count = np.zeros(len(shares), np.int64)
    for block in range(blocks):
        rows._arrange(block)
        for part in range(len(shares)):
            numbers = np.sort(rows._number[rows._which == part])
            assert numbers.tolist() == list(range(count[part], count[part] + len(numbers)))
            count[part] += len(numbers)
        assert count.sum() == (block + 1) * rows.BLOCK
    assert np.abs(count - blocks * rows.BLOCK * np.array(shares) / sum(shares)).max() <= len(shares)


def test_each_part_of_a_mixture_is_read_through_before_it_is_read_again():
    rows = pack([(stream_of([8] * 30), 0.5), (stream_of([8] * 7, 1000), 0.5)], 8, 3, whole=False)
    firsts = [int(rows[i]["input_ids"][0]) for i in range(200)]
    small = [f for f in firsts if f >= 1000]
    for start in range(0, len(small) - 7, 7):
        assert len(set(small[start : start + 7])) == 7


def test_a_list_is_shuffled_anew_each_epoch():
    rows = ListRows([{"x": np.array([i])} for i in range(12)], seed=0)
    epochs = [[int(rows[e * 12 + i]["x"][0]) for i in range(12)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert rows.collate([rows[0], rows[1]])["x"].shape == (2, 1)


@pytest.mark.parametrize("whole", [True, False])
def test_padding_is_marked(whole):
    row = pack([(stream_of([3]), 1.0)], 6, 0, whole=whole, pad=9)[0]
    assert row["segments"].tolist() == [0, 0, 0, -1, -1, -1]
    assert row["input_ids"].tolist() == [10, 11, 12, 9, 9, 9]
    assert row["trained"].tolist() == [False, True, True, False, False, False]
