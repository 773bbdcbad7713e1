"""Data sets of a recipe: their files, formats and splits, and what is measured on them."""

from __future__ import annotations

import gzip

import pytest
from recipe_problems import problems

from graft.recipe import read_recipe

pytestmark = pytest.mark.usefixtures("growing")


BAD_FILES = {
    "binary.txt": (b"fine\n\0\1\2\n", "text", "line 2: expected text, found binary data"),
    "latin.txt": ("caf\u00e9\n".encode("latin-1"), "text", "line 1: expected UTF-8 text, found byte 0xe9"),
    "broken.jsonl": (b'{"text": "a"}\n\nnot json\n', "jsonl", "line 3: expected a JSON object, found 'not json'"),
    "other.jsonl": (b'{"text": "a"}\n{"txet": "b"}\n', "jsonl", "line 2: expected a field 'text'"),
    "ragged.csv": (b"text,label\na,b\nc\n", "csv", "line 3: expected 2 values as in the header, found 1"),
    "twice.csv": (b"text,text\na,b\n", "csv", "line 1: expected a name for each column, found 'text' twice"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 100)[:-9], "jsonl", "the compressed file is damaged"),
    "no.parquet": (b"PAR1 no", "parquet", "expected a parquet file"),
    "empty.txt": (b"", "text", "expected data, found an empty file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_data_file_is_found_before_anything_runs(recipe, tmp_path, name):
    content, source, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    path = recipe(f"family: f\ndata:\n  d: {{source: {source}, path: {name}}}\nmodels: {{a: {{grow: }}}}\n")
    (problem,) = problems(path)
    assert problem.startswith(f"line 3: data.d: {tmp_path / name}")
    assert expected in problem


def test_a_measure_must_fit_the_format_of_the_data(recipe, tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "{n}", "label": "b"}}\n' for n in range(200)))
    found = problems(
        recipe("""
        family: f
        data:
          d: {source: jsonl, path: d.jsonl}
          m: {mix: {d: 1}}
          n: {mix: {m: 1, n: 1}}
        models: {a: {grow: }}
        evaluate:
          - {measure: classification, on: [d.test]}
          - {measure: generation, on: [d.test, m.test]}
        """)
    )
    take = "take bits_per_byte, perplexity, classification"
    misfit = f"expected data of the format completion or pairs, found labelled: {take}"
    assert found == [
        "line 6: data.n: expected a tree, found a cycle: n ← n",
        f"line 10: evaluate.1.on: generation on d.test: {misfit}",
        f"line 10: evaluate.1.on: generation on m.test: {misfit}",
    ]


def test_what_is_written_must_leave_room_for_a_prompt(recipe, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{n}", "completion": "b"}}\n' for n in range(200)))
    for name, more in (("free", ""), ("chosen", "choices: [a, b]\n")):
        task = f"name: {name}\ndata: p.test\nprompt: '{{{{ prompt }}}}'\ntarget: b\n{more}"
        (tmp_path / f"{name}.yaml").write_text(task)
    path = recipe("""
        family: f
        data: {p: {source: jsonl, path: p.jsonl}}
        models:
          short: {pretrain: {data: p, size: 1M, length: 64}}
          child: {tune: {from: short, data: p}}
          wide: {pretrain: {data: p, size: 1M, length: 256}}
          duo: {ensemble: {members: [wide, short], vocabulary: union}}
          alone: {ensemble: {members: [wide]}}
          bytes: {ensemble: {members: [wide, short], vocabulary: bytes}}
        evaluate:
          - {measure: generation, on: [p.test]}
          - {measure: generation, on: [p.test], models: [wide]}
          - {measure: generation, on: [p.test], max_tokens: 63}
          - measure: generation
            on: [p.test]
            models: [wide, alone]
            max_tokens: 256
          - {task: free.yaml}
          - {task: chosen.yaml}
        """)
    writes = "max_tokens: generation writes up to"
    wanted = "expected models that read more, with room for a prompt, found"
    short = f"{wanted} short (64), child (64), duo (64): set `max_tokens: 32`, or another below 64, or name those"
    found = problems(path)
    for line, start in zip(
        found,
        (
            f"line 12: evaluate.0.{writes} 64 tokens: {short} to measure with",
            f"line 18: evaluate.3.{writes} 256 tokens: {wanted} wide (256), alone (256): set `max_tokens: 128`",
            f"line 19: evaluate.4.task: {tmp_path / 'free.yaml'}: max_tokens: the task writes up to 64 tokens: {short}",
        ),
        strict=True,
    ):
        assert line.startswith(start)


def test_what_is_learned_from_is_not_measured_on(recipe):
    path = recipe("""
        family: f
        data:
          d: {source: text, document: line, path: d.txt}
          m: {mix: {d: 1}}
        models:
          a: {pretrain: {data: d, size: 1M}}
          b: {tune: {from: a, data: m.test}}
        evaluate:
          - {measure: bits_per_byte, on: [d.test, d.dev]}
        """)
    (problem,) = problems(path)
    assert problem.startswith("line 10: evaluate.0.on: b learns from d.test, so that nothing measured on it counts")
    path.write_text(path.read_text().replace("m.test", "m"))
    read_recipe(path)


def test_raw_records_cannot_be_trained_on(recipe, tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(f'{{"a": {n}}}\n' for n in range(200)))
    (problem,) = problems(
        recipe("""
        family: f
        data:
          d: {source: jsonl, path: d.jsonl, format: raw}
        models:
          a: {pretrain: {data: d, size: 1M}}
        """)
    )
    assert problem.startswith("line 6: models.a.pretrain: d is raw: records that do not say what is to be produced")


def test_a_split_that_is_read_and_empty_is_a_problem_of_its_data_set(recipe, tmp_path):
    (tmp_path / "one.txt").write_text("a single document\n")
    path = recipe("""
        family: f
        data:
          one: {source: text, path: one.txt}
          many: {source: text, document: line, path: d.txt}
          both: {mix: {one: 1, many: 1}}
          idle: {source: text, path: one.txt}
        models:
          a: {pretrain: {data: both, size: 60k, length: 16, tokenizer: {size: 300}}}
        evaluate:
          - {measure: bits_per_byte, on: [one.test, many.test]}
        """)
    found = problems(path)
    assert [problem.partition(" the data set has")[0] for problem in found] == [
        "line 4: data.one: one.dev: expected at least one document, found none:",
        "line 4: data.one: one.test: expected at least one document, found none:",
    ]
    assert "1 distinct document, split by hash" in found[0]
    assert "with `splits: {dev: 0}` models are trained without one" in found[0]
    path.write_text(
        path.read_text().replace("path: one.txt}", "path: one.txt, splits: {dev: 0}}").replace("one.test", "many.test")
    )
    read_recipe(path)


def test_chats_without_the_assistant_cannot_be_trained_on_and_are_a_problem_of_their_data_set(recipe, tmp_path):
    asked, told = (
        "".join(f'{{"messages": [{{"role": "user", "content": "{n}"}}{more}]}}\n' for n in range(60))
        for more in ("", ', {"role": "assistant", "content": "yes"}')
    )
    (tmp_path / "asked.jsonl").write_text(asked)
    (tmp_path / "told.jsonl").write_text(told + asked.replace('"6', '"x'))
    path = recipe("""
        family: f
        data:
          asked: {source: jsonl, path: asked.jsonl, splits: {dev: 0.2, test: 0}}
          told: {source: jsonl, path: told.jsonl, splits: {dev: 0.2, test: 0}}
          idle: {source: jsonl, path: asked.jsonl}
        models:
          a: {pretrain: {data: asked, size: 60k, length: 16, tokenizer: {size: 300}}}
          b: {pretrain: {data: told, size: 60k, length: 16, tokenizer: {size: 300}}}
        """)
    words = "expected chats with a turn of the role `assistant`, which is what is trained on, found none"
    assert problems(path) == [f"line 4: data.asked: asked.{split}: {words}" for split in ("train", "dev")]


def test_a_misspelt_split_is_shown_the_right_one(recipe):
    path = recipe("""
        family: f
        data:
          code: {source: text, document: line, path: d.txt}
        models: {a: {grow: }}
        evaluate:
          - {measure: bits_per_byte, on: [code.tset, cdoe.test, code.held]}
        """)
    assert [problem.partition("unknown data set ")[2] for problem in problems(path)] == [
        "'code.tset' (did you mean 'code.test'?); there are: code",
        "'cdoe.test' (did you mean 'code'?); there are: code",
        "'code.held'; splits are train, dev, test; there are: code",
    ]


def test_splits_given_as_files_have_no_dev_split_of_which_no_file_is_given(recipe, tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {n}"}}\n' for n in range(3000)))
    text = """
        family: f
        data: {one: {source: jsonl, train: train.jsonl, test: test.jsonl}}
        models: {a: {pretrain: {data: one, size: 60k, length: 16, tokenizer: {size: 300}}}}
        evaluate: [{measure: bits_per_byte, on: [one.SPLIT]}]
        """
    assert read_recipe(recipe(text.replace("SPLIT", "test"))).models
    (problem,) = problems(recipe(text.replace("SPLIT", "dev")))
    assert "one.dev: expected at least one document, found none: files are given for `test`, `train` alone" in problem
