"""Tagged tokens and answers in a context: read, refused where they are not right, and shown as text."""

import json

import pytest

from graft import data
from graft.data.corpus import text_of
from graft.data.library import statements
from graft.data.render import prompt_and_answer
from graft.errors import DataError


def corpus(folder, rows, **more):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"source": "jsonl", "path": "rows.jsonl", "splits": {"dev": 0, "test": 0}, **more}
    return data.open_corpus({"rows": data.parse(raw)}, "rows", folder)


def test_tagged_tokens_are_a_format_of_their_own(tmp_path):
    rows = [{"tokens": ["a", "dog"], "tags": ["DET", "NOUN"]}, {"tokens": ["run"], "tags": ["VERB"]}]
    found = corpus(tmp_path, rows)
    assert found.format == "tagged"
    assert list(found.records("train")) == rows
    assert prompt_and_answer(rows[0]) == ("a dog\n", "DET NOUN")
    assert text_of(rows[0]) == "a dog\nDET NOUN"


def test_tags_may_stand_in_another_field(tmp_path):
    rows = [{"tokens": ["a"], "upos": ["DET"], "xpos": ["DT"]}]
    found = corpus(tmp_path, rows, fields={"tags": "upos"})
    assert list(found.records("train")) == [{"tokens": ["a"], "tags": ["DET"]}]


@pytest.mark.parametrize(
    "answer",
    ["Paris", ["Paris"], {"text": ["Paris"], "answer_start": [3]}, [{"text": "Paris", "answer_start": 3}]],
    ids=["text", "list", "mapping", "mappings"],
)
def test_answers_come_in_the_forms_that_there_are(tmp_path, answer):
    row = {"question": "Where?", "context": "In Paris.", "answer": answer}
    found = corpus(tmp_path, [row])
    assert found.format == "spans"
    (record,) = found.records("train")
    assert record["answer"] == ["Paris"]
    assert prompt_and_answer(record) == ("In Paris.\nWhere?\n", "Paris")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["X"]}, "line 1: expected a tag for each token, found 2 tokens and 1 tags"),
        ({"tokens": "a b", "tags": ["X"]}, "expected a list of words in 'tokens'"),
        ({"tokens": ["a", ""], "tags": ["X", "Y"]}, "expected a list of words in 'tokens'"),
        ({"question": "q", "context": "c", "answer": []}, "expected an answer"),
    ],
)
def test_what_is_not_right_is_refused_with_its_line(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        list(corpus(tmp_path, [row]).records("train"))


def test_statements_of_code_are_tagged():
    code = "def grow(x):\n    if x.size > 3:\n        return print('big', x)\n"
    found = [dict(zip(r["tokens"], r["tags"], strict=True)) for r in statements(code)]
    assert found[0] == {"def": "keyword", "grow": "definition", "(": "operator", "x": "name", ")": "operator",
                        ":": "operator"}  # fmt: skip
    assert found[1]["size"] == "attribute"
    assert found[1]["3"] == "number"
    assert (found[2]["print"], found[2]["'big'"], found[2]["return"]) == ("call", "string", "keyword")


def test_the_library_gives_tagged_and_labelled_data():
    for keep, format in (("tokens", "tagged"), ("packages", "labelled")):
        raw = data.parse({"source": "python-library", "packages": ["json", "email"], "keep": keep})
        found = data.open_corpus({"d": raw}, "d", None)
        assert found.format == format
        assert len(list(found.records("train"))) > 20
    labels = {r["label"] for r in found.records("train")}
    assert labels == {"json", "email"}
