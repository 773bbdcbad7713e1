"""Rows of one document each: pieces without loss, and every answer with what stands before it."""

import json

import numpy as np
import pytest

from graft import data
from graft.data.objective_rows import objective_rows
from graft.data.objectives import Causal, Masked, Span
from graft.errors import DataError


def corpus_of(folder, records):
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    raw = {"source": "jsonl", "train": "a.jsonl", "splits": {"dev": 0, "test": 0}}
    return data.open_corpus({"s": data.parse(raw)}, "s", folder)


def rows_of(folder, records, tokenizer, objective, length=16, **more):
    corpus = corpus_of(folder, records)
    return objective_rows(corpus, "train", tokenizer, objective, length=length, seed=0, cache=folder, **more)


def epoch(rows, number=0):
    return [rows[number * len(rows) + i] for i in range(len(rows))]


def read(tokenizer, row):
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(row["labels"][row["labels"] != -100])


def test_pieces_hold_every_token_once_in_every_epoch(letters, tmp_path):
    texts = ["abcdefghij" * 5, "k" * 16, "lm"]
    rows = rows_of(tmp_path, [{"text": t} for t in texts], letters, Causal(), together=False)
    for number in (0, 1):
        found = sorted(np.concatenate([row["input_ids"] for row in epoch(rows, number)]).tolist())
        assert found == sorted(i for t in texts for i in [1, *letters(t, add_special_tokens=False)["input_ids"], 2])
    assert {tuple(row["input_ids"]) for row in epoch(rows)} == {tuple(row["input_ids"]) for row in epoch(rows, 1)}


def test_a_piece_is_not_trained_on_its_first_token_which_nothing_precedes(letters, tmp_path):
    rows = rows_of(tmp_path, [{"text": "abcdefghij" * 5}], letters, Causal(), together=False)
    assert all(row["labels"][0] == -100 and (row["labels"][1:] != -100).all() for row in epoch(rows))


def test_pieces_of_different_lengths_are_padded_and_masked(letters, tmp_path):
    rows = rows_of(tmp_path, [{"text": "abc"}, {"text": "defgh"}], letters, Causal(), together=False)
    batch = rows.collate(sorted(epoch(rows), key=lambda row: len(row["input_ids"])))
    assert letters.batch_decode(batch["input_ids"]) == ["<s>abc</s><pad><pad>", "<s>defgh</s>"]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 2, [1] * 7]
    assert (batch["labels"] != -100).int().tolist() == [[0, 1, 1, 1, 1, 0, 0], [0] + [1] * 6]


@pytest.mark.parametrize("objective", [Causal(), Masked(), Span()])
def test_a_row_follows_from_seed_and_number_alone(letters, tmp_path, objective):
    texts = [{"text": "abcdefghij" * n} for n in range(1, 6)]
    first, again = (rows_of(tmp_path, texts, letters, objective, together=False) for _ in range(2))
    order = np.random.default_rng(1).permutation(3 * len(first))
    found = {int(i): first[int(i)] for i in order}
    for i in range(3 * len(again)):
        assert all(np.array_equal(again[i][name], found[i][name]) for name in ("input_ids", "labels"))


def test_a_seed_gives_another_order_and_other_masks(letters, tmp_path):
    corpus = corpus_of(tmp_path, [{"text": "abcdefghij" * 40}])
    made = [
        objective_rows(corpus, "train", letters, Masked(), length=400, seed=s, cache=tmp_path)[0]["labels"]
        for s in (0, 1)
    ]
    assert not np.array_equal(*made)


def test_every_answer_of_a_chat_is_a_target_after_all_that_was_said_before(letters, tmp_path):
    turns = [("user", "ab"), ("assistant", "cd"), ("user", "ef"), ("assistant", "gh")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    rows = rows_of(tmp_path, [record], letters, Span(), length=200)
    found = sorted(read(letters, row) for row in epoch(rows))
    first = "<|user|>\nab</s>\n<|assistant|>\n"
    assert [source.removesuffix("</s>") for source, _ in found] == [
        first,
        first + "cd</s>\n<|user|>\nef</s>\n<|assistant|>\n",
    ]
    assert [target.rstrip("\n") for _, target in found] == ["cd</s>", "gh</s>"]


def test_a_source_too_long_loses_its_end_and_a_chat_its_beginning(letters, tmp_path):
    rows = rows_of(tmp_path, [{"source": "abcdefghijklmnopqrstuv", "target": "xyz"}], letters, Span(), length=8)
    assert read(letters, rows[0]) == ("abcdefg</s>", "xyz</s>")
    record = {"messages": [{"role": "user", "content": "abcdef"}, {"role": "assistant", "content": "z"}]}
    rows = rows_of(tmp_path, [record], letters, Span(), length=20)
    assert read(letters, rows[0])[0] == "def</s>\n<|assistant|>\n</s>"


def test_labelled_text_goes_into_the_encoder_and_its_label_comes_out(letters, tmp_path):
    rows = rows_of(tmp_path, [{"text": "abc", "label": "good"}], letters, Span())
    assert read(letters, rows[0]) == ("abc\n</s>", "good</s>")


def test_documents_of_a_mixture_come_in_their_shares(letters, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": name * n}) + "\n" for n in range(1, 12)))
    sets = {
        n: data.parse({"source": "jsonl", "train": f"{n}.jsonl", "splits": {"dev": 0, "test": 0}}) for n in "ab"
    } | {"both": data.parse({"mix": {"a": 3, "b": 1}})}
    corpus = data.open_corpus(sets, "both", tmp_path)
    rows = objective_rows(corpus, "train", letters, Causal(), length=16, seed=0, cache=tmp_path, together=False)
    first = [letters.decode(rows[i]["input_ids"]).removeprefix("<s>")[0] for i in range(1024)]
    assert first.count("a") == 768


def test_an_empty_document_is_no_row_and_one_of_a_letter_is(letters, tmp_path):
    rows = rows_of(tmp_path, [{"text": ""}, {"text": "a"}], letters, Span())
    assert [read(letters, row) for row in epoch(rows)] == [("<extra_id_0></s>", "<extra_id_0>a</s>")]


def test_span_corruption_needs_sentinels_but_pairs_do_not(letters, tmp_path):
    from transformers import PreTrainedTokenizerFast

    bare = json.loads(letters.backend_tokenizer.to_str())
    bare["added_tokens"] = [t for t in bare["added_tokens"] if "extra_id" not in t["content"]]
    bare["model"]["vocab"] = {t: i for t, i in bare["model"]["vocab"].items() if "extra_id" not in t}
    (tmp_path / "t.json").write_text(json.dumps(bare))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "t.json"), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    with pytest.raises(DataError, match="needs a tokenizer with sentinels"):
        rows_of(tmp_path, [{"text": "abc"}], tokenizer, Span())
    assert len(rows_of(tmp_path, [{"source": "abc", "target": "d"}], tokenizer, Span())) == 1
