"""What a member's part of the cache holds, after whatever was read and forgotten: each row's tokens, in order."""

import numpy as np
import pytest
import torch
from tiny_members import bloom, gpt2, llama, mistral
from transformers.cache_utils import DynamicLayer

from graft.ensemble.held import USED, Held, counts_columns
from graft.ensemble.model import ensemble_of


def read(held, new):
    """A member that keeps of every token the token itself, twice over in two heads of three channels."""
    ids, given = held.add(new)
    keys = ids[:, None, :, None].expand(-1, 2, -1, 3).float()
    for layer in held.layers:
        layer.update(keys, -keys)
    return ids, given


def found(held, row):
    """The tokens of a row that the mask shows."""
    keys = held.layers[0].keys[held.rows.index(row), 1, :, 2]
    assert torch.equal(held.layers[0].values[held.rows.index(row), 1, :, 2], -keys)
    return keys[torch.from_numpy(held.mask[held.rows.index(row)]).bool()].int().tolist()


@pytest.mark.parametrize("gaps", [True, False])
def test_it_shows_what_stands_whatever_was_forgotten_and_whichever_rows_have_ended(gaps):
    draw = np.random.default_rng(3)
    held = Held([DynamicLayer(), DynamicLayer()], [0, 1, 2, 3], gaps)
    texts, live = {row: draw.integers(1, 99, 3 + row).tolist() for row in range(4)}, [0, 1, 2, 3]
    for step in range(40):
        if step in (15, 25):
            live = live[1:]
        for row in live:
            stand = int(draw.integers(max(1, held.count(row) - 3), held.count(row) + 1)) if held.count(row) else 0
            held.forget(row, stand)
            texts[row] = texts[row][:stand] if stand else texts[row]
            texts[row] += draw.integers(1, 99, int(draw.integers(1, 4))).tolist()
        if not gaps:  # so many are new that all rows read equally many
            most = max(len(texts[row]) - held.count(row) for row in live)
            for row in live:
                held.forget(row, max(0, len(texts[row]) - most))
        held.tidy(live)
        read(held, {row: texts[row][held.count(row) :] for row in live})
        assert [found(held, row) for row in live] == [texts[row] for row in live]
        if not gaps:
            assert all(np.diff(held.mask[held.rows.index(row)]).min() >= 0 for row in live)
        used = sum(map(held.count, live)) / held.mask.size
        assert used > USED / 2


def test_without_padding_and_gaps_mask_and_positions_say_nothing():
    held = Held([DynamicLayer()], [0], True)
    for new in ([5, 6, 7], [8]):
        ids, given = read(held, {0: new})
        assert ids.tolist() == [new]
        assert set(given.values()) == {None}
    held.forget(0, 2)
    held.tidy([0])
    assert read(held, {0: [9]})[1] == {"attention_mask": None, "position_ids": None}
    assert found(held, 0) == [5, 6, 9]


def test_a_row_with_less_to_read_is_padded_and_its_positions_go_on():
    held = Held([DynamicLayer()], [0, 1], True)
    ids, given = read(held, {0: [5, 6, 7], 1: [8]})
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert given["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert given["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    _, given = read(held, {0: [4], 1: [9]})
    assert given["position_ids"].tolist() == [[3], [1]]


def test_windows_positions_from_the_mask_and_members_of_members_count_columns():
    def counts(model):
        return counts_columns(model, ensemble_of({"a": model}).takes[0])

    assert [counts(each) for each in (llama(), gpt2(), mistral(), bloom())] == [False, False, True, True]
    assert counts(ensemble_of({"a": llama(), "b": mistral()}))
    assert not counts(ensemble_of({"a": llama(), "b": gpt2()}))
