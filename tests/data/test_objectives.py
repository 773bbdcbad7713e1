"""Every objective and every mask against examples by hand; packed documents against documents alone."""

import json

import numpy as np
import pytest
import torch

from graft import data
from graft.data.objective_rows import Tokens, causal_row, masked_row, objective_rows, prefix_row, span_mask, span_row
from graft.data.objectives import Causal, Masked, Prefix, Span, objective_for
from graft.errors import CannotCombine, DataError
from graft.pretrain.architectures import TABLE, Shape, build, config_for
from graft.train.attention import attention_mask, model_inputs
from graft.train.losses import TokenLoss

IDS = {"bos": 1, "eos": 2, "pad": 0}
MASKING = Tokens(0, 1, 2, 3, np.arange(4, 100), np.zeros(0, np.int64))
"""A hundred tokens, of which pad, start, end and mask come first."""


def with_sentinels(first, sentinels):
    return Tokens(0, 1, 2, 3, np.arange(first, 400), np.array(sentinels))


def packed(ids, segments, trained=None):
    segments = np.array(segments)
    positions = np.array([int((segments[:i] == s).sum()) for i, s in enumerate(segments)])
    first = positions == 0
    marks = (segments >= 0) & ~first if trained is None else np.array(trained, bool)
    return {"input_ids": np.array(ids), "segments": segments, "positions": positions, "trained": marks}


ROW = packed([5, 6, 7, 8, 9, 0], [0, 0, 0, 1, 1, -1])


def test_causal_labels_are_the_tokens_that_have_something_before_them():
    assert causal_row(ROW)["labels"].tolist() == [-100, 6, 7, -100, 9, -100]


def test_a_causal_mask_stays_within_its_document():
    seen = attention_mask(torch.tensor([[0, 0, 0, 1, 1, -1]]), causal=True)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_a_prefix_sees_itself_both_ways_and_is_not_trained_on():
    row = prefix_row(packed([5, 6, 7, 8, 9, 4], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1]), None)
    assert row["prefix"].tolist() == [True, True, False, False, True, False]
    assert row["labels"].tolist() == [-100, -100, 7, 8, -100, 4]
    batch = {name: torch.from_numpy(value)[None] for name, value in row.items()}
    seen = attention_mask(batch["segments"], causal=True, prefix=batch["prefix"])[0, 0].int().tolist()
    assert seen == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_a_drawn_prefix_leaves_something_to_train_on():
    for seed in range(50):
        row = prefix_row(packed(range(10, 20), [0] * 6 + [1] * 4), np.random.default_rng(seed))
        for segment in (0, 1):
            here = row["segments"] == segment
            assert row["prefix"][here][0]
            assert (row["labels"][here] != -100).any()


def test_an_encoders_mask_sees_its_whole_document():
    seen = attention_mask(torch.tensor([[0, 0, 1, -1]]), causal=False)[0, 0].int().tolist()
    assert seen == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_an_additive_mask_is_zero_where_seen_and_very_small_elsewhere():
    mask = attention_mask(torch.tensor([[0, 0]]), causal=True, additive=torch.float32)[0, 0]
    assert mask.tolist() == [[0.0, torch.finfo(torch.float32).min], [0.0, 0.0]]


def test_masking_hides_its_share_in_berts_proportions():
    ids = np.tile(np.arange(10, 60), 80)
    row = packed(ids, [0] * len(ids))
    found = masked_row(row, Masked(), np.random.default_rng(0), MASKING)
    chosen = found["labels"] != -100
    assert chosen.sum() == round(0.15 * len(ids))
    assert (found["labels"][chosen] == ids[chosen]).all()
    hidden = (found["input_ids"][chosen] == 3).mean()
    kept = (found["input_ids"][chosen] == ids[chosen]).mean()
    assert hidden == pytest.approx(0.8, abs=0.05)
    assert kept == pytest.approx(0.1, abs=0.04)
    assert (found["input_ids"][~chosen] == ids[~chosen]).all()


def test_masking_never_takes_special_tokens_or_padding():
    row = packed([1, 10, 2, 0], [0, 0, 0, -1])
    found = masked_row(row, Masked(share=0.9, masked=1, random=0), np.random.default_rng(0), MASKING)
    assert found["input_ids"].tolist() == [1, 3, 2, 0]
    assert found["labels"].tolist() == [-100, 10, -100, -100]


def test_of_data_with_answers_only_the_answers_are_masked():
    row = packed([10, 11, 12, 13, 2], [0] * 5, [0, 0, 0, 1, 1])
    found = masked_row(row, Masked(masked=1, random=0), np.random.default_rng(0), MASKING, answers_only=True)
    assert found["input_ids"].tolist() == [10, 11, 12, 3, 2]
    assert found["labels"].tolist() == [-100, -100, -100, 13, -100]


def test_shares_of_masking_cannot_exceed_all():
    with pytest.raises(ValueError, match="masked \\+ random of at most 1"):
        Masked(masked=0.8, random=0.3)


def test_span_corruption_is_t5s_example(monkeypatch):
    # "Thank you for inviting me to your party last week": for inviting / last are taken out
    ids = np.array([1, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 2])
    hidden = np.isin(ids[1:-1], [22, 23, 28])
    monkeypatch.setattr("graft.data.objective_rows.span_mask", lambda *_: hidden)
    row = span_row(ids, Span(), np.random.default_rng(0), with_sentinels(20, [7, 8, 9]))
    assert row["input_ids"].tolist() == [20, 21, 7, 24, 25, 26, 27, 8, 29, 2]
    assert row["labels"].tolist() == [7, 22, 23, 8, 28, 2]


@pytest.mark.parametrize("length", [2, 3, 10, 100, 333])
def test_spans_take_out_their_share_in_runs_of_their_mean_length(length):
    for seed in range(20):
        hidden = span_mask(length, Span(), np.random.default_rng(seed), 100)
        assert len(hidden) == length
        wanted = min(max(round(0.15 * length), 1), length - 1)
        assert hidden.sum() == wanted
        starts = (hidden & ~np.concatenate([[False], hidden[:-1]])).sum()
        assert starts == min(max(round(wanted / 3), 1), wanted, length - wanted)
        assert not hidden[0]


def test_a_corrupted_text_can_be_put_together_again():
    ids = np.arange(200, 300)
    row = span_row(ids, Span(), np.random.default_rng(1), with_sentinels(10, range(4, 10)))
    runs, current = {}, None
    for token in row["labels"][:-1]:
        if token < 10:
            current = int(token)
            runs[current] = []
        else:
            runs[current].append(int(token))
    whole = [t for token in row["input_ids"][:-1] for t in (runs[int(token)] if token < 10 else [int(token)])]
    assert whole == ids.tolist()


@pytest.mark.parametrize(("architecture", "positions"), [key for key in TABLE if key[0] != "encoder-decoder"])
def test_a_packed_document_is_read_as_if_it_stood_alone(architecture, positions):
    torch.manual_seed(0)
    model = build(config_for(architecture, positions, Shape(32, 2, 4, 60, 32, 0.0, IDS))).eval()
    first, second = torch.randint(4, 60, (1, 7)), torch.randint(4, 60, (1, 9))
    row = packed([*first[0].tolist(), *second[0].tolist(), 0, 0], [0] * 7 + [1] * 9 + [-1] * 2)
    batch = {name: torch.from_numpy(row[name])[None] for name in ("input_ids", "segments", "positions")}
    with torch.no_grad():
        together = model(**model_inputs(model, batch)).logits
        alone = [model(input_ids=ids).logits for ids in (first, second)]
    torch.testing.assert_close(together[:, :7], alone[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(together[:, 7:16], alone[1], atol=2e-5, rtol=1e-4)


def test_a_decoders_prefix_really_sees_what_comes_after_it():
    torch.manual_seed(0)
    model = build(config_for("decoder", "rotary", Shape(32, 2, 4, 60, 32, 0.0, IDS))).eval()
    batch = {
        "input_ids": torch.randint(4, 60, (1, 8)), "segments": torch.zeros(1, 8, dtype=torch.long),
        "positions": torch.arange(8)[None], "prefix": torch.arange(8)[None] < 5,
    }  # fmt: skip
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 4] = 3
    late = {**batch, "input_ids": batch["input_ids"].clone()}
    late["input_ids"][0, 7] = 3
    with torch.no_grad():
        logits = [model(**model_inputs(model, b)).logits[0] for b in (batch, changed, late)]
    assert not torch.allclose(logits[0][0], logits[1][0])
    assert torch.allclose(logits[0][:7], logits[2][:7], atol=1e-6)


@pytest.mark.parametrize(("architecture", "positions"), list(TABLE))
def test_every_class_learns_under_its_objective(architecture, positions, letters, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{'abcdefgh' * 3}{n}"}) + "\n" for n in range(40)))
    raw = {"source": "jsonl", "train": str(path), "splits": {"dev": 0, "test": 0}}
    corpus = data.open_corpus({"s": data.parse(raw)}, "s", tmp_path)
    objective = objective_for(architecture, None)
    rows = objective_rows(corpus, "train", letters, objective, length=24, seed=0, cache=tmp_path)
    torch.manual_seed(0)
    model = build(config_for(architecture, positions, Shape(32, 1, 2, len(letters), 32, 0.0, IDS)))
    loss, optimizer = TokenLoss(), torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(12):
        batch = rows.collate([rows[step * 8 + i] for i in range(8)])
        value = loss(model, batch) / loss.weight(batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]


def test_pairs_go_into_the_two_halves_of_an_encoder_decoder(letters, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"source": "abc", "target": "de"}) + "\n")
    raw = {"source": "jsonl", "train": str(path), "splits": {"dev": 0, "test": 0}}
    corpus = data.open_corpus({"s": data.parse(raw)}, "s", tmp_path)
    rows = objective_rows(corpus, "train", letters, Span(), length=24, seed=0, cache=tmp_path)
    batch = rows.collate([rows[0]])
    assert letters.decode(batch["input_ids"][0]) == "abc\n</s>"
    assert letters.decode(batch["labels"][0]) == "de</s>"


def test_rows_without_neighbours_need_no_mask(letters, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "ab" * 200}) + "\n")
    raw = {"source": "jsonl", "train": str(path), "splits": {"dev": 0, "test": 0}}
    corpus = data.open_corpus({"s": data.parse(raw)}, "s", tmp_path)
    rows = objective_rows(corpus, "train", letters, Causal(), length=16, seed=0, cache=tmp_path)
    full = [rows[i] for i in range(len(rows)) if rows[i]["segments"].min() == 0]
    assert set(rows.collate(full)) == {"input_ids", "labels"}


def test_a_prompt_that_fills_the_row_leaves_nothing_to_train_on(letters, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 50, "completion": "b"}) + "\n")
    raw = {"source": "jsonl", "train": str(path), "splits": {"dev": 0, "test": 0}}
    corpus = data.open_corpus({"s": data.parse(raw)}, "s", tmp_path)
    with pytest.raises(DataError, match="every label is masked; raise `length`"):
        objective_rows(corpus, "train", letters, Causal(), length=16, seed=0, cache=tmp_path)


@pytest.mark.parametrize("objective", [Causal(), Span()])
def test_chats_in_which_the_assistant_says_nothing_are_told_apart_from_rows_that_are_too_short(
    letters, tmp_path, objective
):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    raw = {"source": "jsonl", "train": str(path), "splits": {"dev": 0, "test": 0}}
    corpus = data.open_corpus({"s": data.parse(raw)}, "s", tmp_path)
    with pytest.raises(DataError, match=r"s\.train: expected chats with a turn of the role `assistant`.*found none"):
        objective_rows(corpus, "train", letters, objective, length=64, seed=0, cache=tmp_path)


@pytest.mark.parametrize(
    ("architecture", "objective"), [("encoder", Causal()), ("decoder", Masked()), ("encoder-decoder", Prefix())]
)
def test_an_objective_that_does_not_fit_is_refused_with_those_that_do(architecture, objective):
    with pytest.raises(CannotCombine, match="which trains by"):
        objective_for(architecture, objective)


def test_masked_lm_needs_a_mask_token(letters, tmp_path):
    from copy import deepcopy

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "abc"}) + "\n")
    raw = {"source": "jsonl", "train": str(path), "splits": {"dev": 0, "test": 0}}
    corpus = data.open_corpus({"s": data.parse(raw)}, "s", tmp_path)
    tokenizer = deepcopy(letters)
    tokenizer.mask_token = None
    with pytest.raises(DataError, match="mask token"):
        objective_rows(corpus, "train", tokenizer, Masked(), length=16, seed=0, cache=tmp_path)
