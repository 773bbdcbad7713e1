"""Token streams hold every document once, are made once, and say what is trained on."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from graft import data
from graft.data.render import render
from graft.data.stream import tokenize, tokenizer_hash
from graft.errors import DataError


def corpus_of(tmp_path, rows, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"source": "jsonl", "train": str(path), "splits": {"dev": 0, "test": 0}, **more}
    return data.open_corpus({"set": data.parse(raw)}, "set", tmp_path)


def trained_text(rendered, tokenizer):
    return tokenizer.decode(rendered.ids[rendered.trained])


def test_text_is_trained_on_whole_but_for_what_nothing_stands_before(letters):
    (found,) = render([{"text": "abc"}], "text", letters)
    assert found.ids.tolist() == [1, 100, 101, 102, 2]
    assert found.trained.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("format", "record", "whole", "trained"),
    [
        ("completion", {"prompt": "ab", "completion": "cd"}, "<s>abcd</s>", "cd</s>"),
        ("pairs", {"source": "ab", "target": "c"}, "<s>ab\nc</s>", "c</s>"),
        ("labelled", {"text": "ab", "label": "yes"}, "<s>ab\nyes</s>", "yes</s>"),
    ],
)
def test_of_a_prompt_with_an_answer_the_answer_is_trained_on(letters, format, record, whole, trained):
    (found,) = render([record], format, letters)
    assert letters.decode(found.ids) == whole
    assert trained_text(found, letters) == trained


def test_a_tokenizer_that_cuts_and_pads_gives_every_token_and_no_more(letters):
    from copy import deepcopy

    tokenizer = deepcopy(letters)
    before = tokenizer_hash(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding()
    found = list(render([{"text": "a" * 20}, {"text": "b"}], "text", tokenizer))
    assert [len(r.ids) for r in found] == [22, 3]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (chat,) = render([{"messages": talk}], "chat", tokenizer)
    assert letters.decode(chat.ids) == letters.apply_chat_template(talk, tokenize=False)
    assert tokenizer_hash(tokenizer) == before


def test_a_stream_holds_every_document_in_order(letters, tmp_path):
    rows = [{"text": text} for text in ("abc", "d", "xyzxyz")]
    stream = tokenize(corpus_of(tmp_path, rows), "train", letters, tmp_path / "cache")
    assert stream.documents == 3
    assert [letters.decode(stream.document(i)[0]) for i in range(3)] == ["<s>abc</s>", "<s>d</s>", "<s>xyzxyz</s>"]
    assert stream.ids.dtype == np.uint16
    assert isinstance(stream.ids, np.memmap)


def test_a_stream_is_made_once(letters, tmp_path, monkeypatch):
    corpus = corpus_of(tmp_path, [{"text": "abc"}])
    first = tokenize(corpus, "train", letters, tmp_path / "cache")
    monkeypatch.setattr("graft.data.render.render", lambda *_: pytest.fail("made again"))
    again = tokenize(corpus, "train", letters, tmp_path / "cache")
    assert again.ids.tolist() == first.ids.tolist()


def test_another_tokenizer_or_split_makes_another_stream(letters, tmp_path):
    from copy import deepcopy

    corpus = corpus_of(tmp_path, [{"text": "abc"}])
    tokenize(corpus, "train", letters, tmp_path / "cache")
    other = deepcopy(letters)
    other.bos_token = "</s>"
    assert tokenize(corpus, "train", other, tmp_path / "cache").ids[0] == 2


def test_what_a_kill_left_is_not_taken_for_a_stream(letters, tmp_path):
    corpus = corpus_of(tmp_path, [{"text": "abc"}])
    tokenize(corpus, "train", letters, tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "streams").iterdir()
    half = folder.parent / f".{folder.name}.99999.part"
    folder.rename(half)
    (half / "stream.json").unlink()
    assert tokenize(corpus, "train", letters, tmp_path / "cache").documents == 1


def test_raw_records_are_not_trained_on(letters, tmp_path):
    corpus = corpus_of(tmp_path, [{"question": "a", "answer": "b"}], format="raw")
    with pytest.raises(DataError, match="give their `format`"):
        tokenize(corpus, "train", letters, tmp_path / "cache")


FULL = """
import resource, signal, sys
from graft.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
sys.argv = ["graft", "run", "recipe.yaml", "--out", "run"]
main()
"""


def test_a_disk_that_fills_up_while_text_is_tokenised_is_named(tmp_path, beside):
    (tmp_path / "d.txt").write_text("".join(f"{n} is a number of its own\n" for n in range(12_000)))
    (tmp_path / "recipe.yaml").write_text(
        "family: f\ndata:\n  d: {source: text, document: line, path: d.txt, splits: {dev: 0}}\nmodels:\n"
        "  a: {pretrain: {data: d, hidden: 8, layers: 1, heads: 1, length: 16, tokenizer: {size: 280}}}\n"
    )
    made = beside.run(FULL, cwd=tmp_path)
    assert made.returncode == 1
    assert "larger than this process may write" in made.stderr
    assert f"{tmp_path}/run/cache/streams/" in made.stderr
    assert "defect" not in made.stderr


MEASURE = """
import resource, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from graft import data
from graft.data import sources, stream
stream.BATCH_CHARACTERS, sources.MOST = 100_000, 300_000
known = {"?": 0, "<s>": 1, "of": 2, "some": 3, "text": 4}
words = Tokenizer(models.WordLevel(known, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer, place = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", bos_token="<s>"), Path(sys.argv[1])
for size in ("small", "large"):
    for document in ("paragraph", "file"):
        raw = {"source": "text", "document": document, "train": f"{size}.txt", "splits": {"dev": 0, "test": 0}}
        stream.tokenize(data.open_corpus({"s": data.parse(raw)}, "s", place), "train", tokenizer, place / "cache")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_stays_flat_when_the_corpus_grows(tmp_path):
    for size, megabytes in (("small", 2), ("large", 10)):
        paragraphs = (f"paragraph {n} " + "of some text " * 75 + "\n\n" for n in range(megabytes * 1000))
        (tmp_path / f"{size}.txt").write_text("".join(paragraphs))
    made = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    small, large = (int(line) / 1024 for line in made.stdout.split())
    # where all text is read, or all tokens are held, it is 60 MB and more; the allocator's slack is up to 4
    assert large - small < 8


MAKE = """
import sys
from pathlib import Path
from graft import data, models
from graft.data.stream import tokenize
tokenizer = models.load_tokenizer(sys.argv[1])
raw = {"source": "python-library", "packages": ["json", "html"], "splits": {"dev": 0, "test": 0}}
made = tokenize(data.open_corpus({"s": data.parse(raw)}, "s", Path()), "train", tokenizer, Path(sys.argv[2]))
print(made.documents, int(made.ids.astype("int64").sum()))
"""


def test_two_processes_that_make_a_stream_at_once_both_get_it(letters, tmp_path, beside):
    letters.save_pretrained(tmp_path / "tokenizer")
    both = [beside.start(MAKE, tmp_path / "tokenizer", tmp_path / "cache") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert both[0].stdout == both[1].stdout != ""
    assert len(list((tmp_path / "cache" / "streams").iterdir())) == 1


def test_a_stream_in_many_batches_is_that_of_one(letters, tmp_path, monkeypatch):
    corpus = corpus_of(tmp_path, [{"text": f"text {n} " * (n % 9)} for n in range(200)])
    whole = tokenize(corpus, "train", letters, tmp_path / "one")
    monkeypatch.setattr("graft.data.stream.BATCH_CHARACTERS", 100)
    pieces = tokenize(corpus, "train", letters, tmp_path / "many")
    assert np.array_equal(whole.ids, pieces.ids)
    assert np.array_equal(whole.offsets, pieces.offsets)
