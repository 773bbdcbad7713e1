"""The exact largest values: against a sort, with many ties, small pieces, and brackets that miss or hold too much."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import Far

from graft.merge import _select
from graft.merge._select import largest
from graft.merge.stream import Piece, Workers


class Held:
    """Stands in for a tensor in files: values in memory, in pieces of seven elements."""

    def __init__(self, values, workers, piece=7):
        self.values, self.workers, self.piece = torch.as_tensor(values, dtype=torch.float32), workers, piece
        self.count, self.row, self.by_rows = len(values), 1, False

    def spans(self):
        return [(start, min(self.piece, self.count - start)) for start in range(0, self.count, self.piece)]

    def read(self, start, count):
        return Piece(start, [self.values[start : start + count].clone()])


def chosen(tensors, counts):
    """Bool arrays, by stream: what the cuts keep over all tensors, end to end."""
    cuts = largest(tensors, lambda piece: [piece.models[0].abs()] * len(counts), counts)
    return [
        np.concatenate(
            [
                cut.keep(tensor.read(start, count).models[0].abs(), start)
                for cut, tensor in zip(of_stream, tensors, strict=True)
                for start, count in tensor.spans()
            ]
        )
        for of_stream in cuts
    ]


def by_sorting(values, count):
    order = sorted(range(len(values)), key=lambda i: (-abs(np.float32(values[i])), i))
    made = np.zeros(len(values), dtype=bool)
    made[order[:count]] = True
    return made


@pytest.fixture(scope="module", params=[Workers, Far])
def workers(request):
    with request.param(2) as pool:
        yield pool


@pytest.fixture(params=["one pass", "bad guesses", "little room", "long runs"])
def difficulty(request, monkeypatch):
    """However the first bracket lies and however little may be held, the answer is the same."""
    if request.param != "one pass":
        monkeypatch.setattr(_select, "FEW", 0)
        monkeypatch.setattr(_select, "LENGTH", 13)
    if request.param == "bad guesses":
        monkeypatch.setattr(_select, "SAMPLES", 1)
        monkeypatch.setattr(_select, "MOST", 2)
        monkeypatch.setattr(_select, "MARGIN", 0.0)
    if request.param == "little room":
        monkeypatch.setattr(_select, "HELD", 1)
    if request.param == "long runs":
        monkeypatch.setattr(_select, "RUNS", 3)
        monkeypatch.setattr(_select, "HELD", 400)


@pytest.mark.parametrize("kind", ["normal", "few values", "one value", "mostly zero", "sorted"])
def test_it_keeps_what_sorting_keeps(kind, workers, difficulty):
    draw = np.random.default_rng(1)
    values = {
        "normal": draw.normal(size=1500),
        "few values": draw.integers(-3, 4, size=1500) / 8,
        "one value": np.full(1500, 0.25),
        "mostly zero": draw.normal(size=1500) * (draw.random(1500) < 0.05),
        "sorted": np.arange(1500) / 7,
    }[kind]
    counts = [0, 1, 150, 749, 1499, 1500]
    found = chosen([Held(values, workers, piece=70)], counts)
    for count, mask in zip(counts, found, strict=True):
        assert mask.sum() == count
        np.testing.assert_array_equal(mask, by_sorting(values, count))


def test_over_several_tensors_the_first_ties_win(workers, difficulty):
    parts = [[1.0, 2.0, 2.0], [3.0, 2.0, 2.0, 0.5], [2.0, 9.0]]
    (mask,) = chosen([Held(part, workers, piece=2) for part in parts], [5])
    assert mask.tolist() == by_sorting([v for part in parts for v in part], 5).tolist()
    assert mask.tolist() == [False, True, True, True, True, False, False, False, True]


@given(st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_any_values_and_any_count(values, data):
    count = data.draw(st.integers(0, len(values)))
    serial = SimpleNamespace(
        map=lambda function, items: [function(item) for item in items], near=data.draw(st.booleans())
    )
    (mask,) = chosen([Held(values, serial)], [count])
    np.testing.assert_array_equal(mask, by_sorting(values, count))


def test_shrinking_keeps_what_the_cut_keeps(workers):
    values = torch.tensor([0.5, -2.0, 2.0, 0.0, 2.0, -0.25, 1.0])
    ((cut,),) = largest([Held(values, workers, piece=3)], lambda piece: [piece.models[0].abs()], [2])
    pieces = [cut.shrink(values[start : start + 3].clone(), start) for start in (0, 3, 6)]
    assert torch.cat(pieces).tolist() == [0, -2, 2, 0, 0, 0, 0]
