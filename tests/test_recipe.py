"""A recipe is checked whole: every problem at once, each with its line."""

from __future__ import annotations

import gzip
import textwrap

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from graft.errors import RecipeError, RequestError
from graft.evaluate import MEASURES
from graft.pretrain.architectures import Shape, build, config_for
from graft.recipe import read_recipe
from graft.verbs import verb_names
from graft.yaml_lines import read_yaml

pytestmark = pytest.mark.usefixtures("growing")


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, beside a text of two hundred lines (`d.txt`)."""
    (tmp_path / "d.txt").write_text("".join(f"line {n}\n" for n in range(200)))

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def problems(path):
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    return [str(problem) for problem in error.value.problems]


def test_a_recipe_gives_nodes_in_an_order_in_which_they_can_be_made(recipe):
    found = read_recipe(
        recipe("""
        family: f
        seed: 3
        models:
          child: {grow: {parents: [mother, father]}}
          mother: {grow: {steps: 2}, seed: 7}
          father: {grow: }
        """)
    )
    assert list(found.models) == ["mother", "father", "child"]
    assert {name: node.seed for name, node in found.models.items()} == {"mother": 7, "father": 3, "child": 3}
    assert found.models["child"].models == ("mother", "father")
    assert found.models["mother"].line == 6
    assert found.ancestors(["mother"]) == ["mother"]


def test_all_problems_are_reported_at_once_each_with_its_line(recipe):
    assert problems(
        recipe("""
        family: f
        data:
          notes: {source: jsonl, path: nowhere.jsonl}
        models:
          a: {grwo: {}}
          b: {grow: {stesp: 3}}
          c: {grow: {parents: [bb], data: note}}
          d:
            grow:
              steps: many
        """)
    ) == [
        f"line 4: data.notes: {recipe('').parent}/nowhere.jsonl: expected a file, folder or glob, found none; "
        "paths are relative to the recipe's folder",
        "line 6: models.a.grwo: unknown verb 'grwo' (did you mean 'grow'?); there are: "
        + ", ".join(sorted(verb_names())),
        "line 7: models.b.grow.stesp: unknown key (did you mean 'steps'?); there are: parents, data, steps, pause_s, "
        "fails, kind, journal",
        "line 8: models.c.grow.parents.0: unknown model 'bb' (did you mean 'b'?); there are: a, b, c, d",
        "line 8: models.c.grow.data: unknown data set 'note' (did you mean 'notes'?); there are: notes",
        "line 11: models.d.grow.steps: expected a valid integer, found 'many'",
    ]


def test_a_cycle_is_shown(recipe):
    assert problems(
        recipe("""
        family: f
        models:
          a: {grow: {parents: [c]}}
          b: {grow: {parents: [a]}}
          c: {grow: {parents: [b]}}
          alone: {grow: {parents: [alone]}}
        """)
    ) == [
        "line 4: models.a: expected a tree, found a cycle: a ← c ← b ← a",
        "line 7: models.alone: expected a tree, found a cycle: alone ← alone",
    ]


def test_what_cannot_be_combined_is_refused_from_facts_of_models_that_do_not_exist_yet(recipe):
    assert problems(
        recipe("""
        family: f
        models:
          a: {grow: {kind: decoder}}
          b: {grow: {kind: encoder}}
          both: {grow: {parents: [a, b]}}
          after: {grow: {parents: [both]}}
        """)
    ) == ["line 6: models.both.grow: parents of one kind can be grown together, found ['decoder', 'encoder']"]


def test_an_unknown_section_does_not_hide_what_else_is_wrong(recipe):
    assert problems(
        recipe("""
        family: f
        modles: {}
        models:
          a: {grow: {parents: [x]}}
        """)
    ) == [
        "line 3: modles: unknown key (did you mean 'models'?); there are: family, seed, data, models, evaluate, report",
        "line 5: models.a.grow.parents.0: unknown model 'x'; there are: a",
    ]


def test_a_misspelt_section_is_read_as_the_one_it_is_nearest_to(recipe):
    assert problems(
        recipe("""
        family: f
        seed: many
        modles:
          a: {grow: {parents: [x]}}
        """)
    ) == [
        "line 2: models: this key is required and missing",
        "line 2: models.a.grow.parents.0: unknown model 'x'; there are: a",
        "line 3: seed: expected a valid integer, found 'many'",
        "line 4: modles: unknown key (did you mean 'models'?); there are: family, seed, data, models, evaluate, report",
    ]


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
    misfit = "expected data of the format completion or pairs, found labelled"
    assert found == [
        "line 6: data.n: expected a tree, found a cycle: n ← n",
        f"line 10: evaluate.1.on: generation on d.test: {misfit}",
        f"line 10: evaluate.1.on: generation on m.test: {misfit}",
    ]


def test_a_measure_must_fit_the_architecture_of_the_models_it_is_taken_of(recipe):
    path = recipe("""
        family: f
        data:
          d: {source: text, document: line, path: d.txt}
        models:
          left: {pretrain: {data: d, size: 1M}}
          both: {pretrain: {data: d, size: 1M, architecture: encoder}}
        evaluate:
          - {measure: bits_per_byte, on: [d.test]}
          - {measure: bits_per_byte, on: [d.test], models: [left]}
          - {measure: perplexity, on: [d.test], models: [rigth]}
        """)
    assert problems(path) == [
        "line 9: evaluate.0: expected models of the architecture decoder, found both (encoder): "
        "name those to measure with `models: […]`",
        "line 11: evaluate.2.models.0: unknown model 'rigth'; there are: both, left",
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


def test_weights_that_are_no_numbers_are_problems_with_lines(recipe):
    path = recipe("""
        family: f
        models:
          a: {grow: }
          b: {merge: {models: {a: .inf}}}
          c: {ensemble: {members: {a: .nan}}}
        """)
    assert problems(path) == [
        "line 5: models.b.merge.models.a: expected a finite number, found inf",
        "line 6: models.c.ensemble.members.a: expected a finite number, found nan",
    ]


def test_of_numbers_that_are_all_wrong_it_is_not_said_that_there_is_none(recipe):
    path = recipe("""
        family: f
        models:
          a: {grow: }
          b: {grow: }
          i: {merge: {models: {a: .nan, b: .inf}}}
        """)
    assert problems(path) == [
        "line 6: models.i.merge.models.a: expected a finite number, found nan",
        "line 6: models.i.merge.models.b: expected a finite number, found inf",
    ]
    path.write_text("family: f\nmodels: {i: {merge: {models: {}}}}\n")
    assert "at least 1 item" in problems(path)[0]


@pytest.mark.parametrize("settings", ["pretrain: {data: d, size: 1M, seed: 3}", "grow: {seed: 3}"])
def test_a_seed_among_the_settings_of_a_verb_is_told_where_seeds_stand(recipe, settings):
    data = "data:\n  d: {source: text, document: line, path: d.txt}\n"
    (problem,) = problems(recipe(f"family: f\n{data}models:\n  a: {{{settings}}}\n"))
    verb = settings.partition(":")[0]
    assert problem == (
        f"line 5: models.a.{verb}.seed: expected `seed` beside `{verb}` (`a: {{{verb}: …, seed: …}}`) or at the top of "
        "the recipe, found it among the verb's settings"
    )


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


def test_a_broken_model_is_a_problem_with_a_line_as_any_other(recipe, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"xx")
    found = problems(recipe("family: f\nmodels:\n  a: {load: broken}\n  b: {grow: {parents: [x]}}\n"))
    assert found[0].startswith("line 3: models.a.load: ")
    assert "expected a safetensors file, found 2 bytes" in found[0]
    assert found[1] == "line 4: models.b.grow.parents.0: unknown model 'x'; there are: a, b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("family: f\nmodels: [1\nb: 2", "line 3: this is not YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("- a\n- b", "line 1: expected the sections family, seed, data, models, evaluate, report, found a list"),
        ("", "expected the sections family, seed, data, models, evaluate, report, found nothing"),
        (" \n\n", "expected the sections family, seed, data, models, evaluate, report, found nothing"),
        ("# nothing yet\n", "expected the sections family, seed, data, models, evaluate, report, found nothing"),
        (
            "just words",
            "line 1: expected the sections family, seed, data, models, evaluate, report, found the text",
        ),
        ("family: f", "line 1: models: this key is required and missing"),
        ("family: a/b\nmodels: {a: {grow: }}", "line 1: family: expected a name of letters, digits, - and _"),
        ("family: f\nmodels: {a.dev: {grow: }}", "line 2: models.a.dev: expected a name of letters, digits, - and _"),
        (
            "family: f\nmodels:\n  a: {grow: }\n  a: {grow: }",
            "line 4: models.a: this key stands twice; the first is on",
        ),
        ("family: f\nmodels: {a: {grow: , tune: }}", "line 2: models.a: expected one verb with its settings"),
        (
            "family: f\nmodels: {a: {grow: , seed: x}}",
            "line 2: models.a.seed: expected a whole number from 0, found 'x'",
        ),
        (
            "family: f\nmodels: {a: {load: ./there}}",
            "line 2: models.a.load: expected a model's folder (with config.json)",
        ),
    ],
)
def test_a_file_that_is_no_recipe_says_why(recipe, text, expected):
    (problem,) = problems(recipe(text))
    assert problem.startswith(expected)


def test_measures_are_checked_with_everything_else(recipe):
    path = recipe("""
        family: f
        models: {a: {grow: }}
        evaluate:
          - {measure: bits_per_bite, on: [x.test]}
          - {measure: perplexity, on: [note.test], limti: 3}
          - {measure: perplexity, on: [note.test]}
          - {task: trivia.yaml}
        """)
    names = ", ".join(sorted(name for name in MEASURES if name != "task"))
    assert problems(path) == [
        f"line 5: evaluate.0.measure: unknown measure 'bits_per_bite' (did you mean 'bits_per_byte'?); "
        f"there are: {names}",
        "line 5: evaluate.0.on.0: unknown data set 'x.test'; there are: none",
        "line 6: evaluate.1.limti: unknown key (did you mean 'limit'?); there are: models, limit, on, measure",
        "line 6: evaluate.1.on.0: unknown data set 'note.test'; there are: none",
        "line 7: evaluate.2.on.0: unknown data set 'note.test'; there are: none",
        f"line 8: evaluate.3.task: {path.parent / 'trivia.yaml'}: expected a task's file, found none; paths are "
        "relative to the recipe's folder",
    ]


def test_a_file_that_is_not_there_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match=r"expected a recipe \(a YAML file\) at .*none.yaml"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "found a folder"),
        (b"\x89PNG\r\n\0\0", "found binary data"),
        ("family: f\n# caf\u00e9\n".encode("latin-1"), "in UTF-8, found byte 0xe9 in line 2"),
    ],
)
def test_a_folder_and_what_is_no_text_are_wrong_requests(tmp_path, content, expected):
    path = tmp_path / "recipe.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        read_recipe(path)
    assert str(error.value).endswith(expected)
    assert str(error.value).startswith(f"expected a recipe (a YAML file) at {path}, ")


def test_files_that_may_not_be_read_are_named(recipe, tmp_path, monkeypatch):
    path = recipe("family: f\ndata: {d: {source: text, path: d.txt}}\nmodels: {a: {grow: }}\n")
    forbid(monkeypatch, "graft.data.files.open", tmp_path / "d.txt")
    (problem,) = problems(path)
    assert problem == f"line 2: data.d: {tmp_path}/d.txt: may not be read; change its permissions"
    forbid(monkeypatch, "pathlib.io.open", path)
    with pytest.raises(RequestError, match=r"found one that may not be read; change its permissions"):
        read_recipe(path)


def test_models_that_may_not_be_read_are_told_with_their_line(recipe, tmp_path, monkeypatch):
    path = recipe("family: f\nmodels:\n  a: {load: there}\n  b: {load: there}\n")

    def refused(error):
        monkeypatch.setattr("graft._load.Load.located", lambda *args: (_ for _ in ()).throw(error))

    refused(PermissionError(13, "Permission denied", "there/config.json"))
    first, second = problems(path)
    assert first.startswith("line 3: models.a.load: there/config.json: permission denied; change its permissions")
    assert second.startswith("line 4: models.b.load:")
    refused(PermissionError(1, "Operation not permitted"))  # no file's: not the reader's to mend
    with pytest.raises(PermissionError):
        read_recipe(path)


def forbid(monkeypatch, name, path):
    """Opening this file is refused, as it is to people who may not read it (whoever runs the tests may read all)."""

    def opened(file, *args, **more):
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return open(file, *args, **more)

    monkeypatch.setattr(name, opened, raising=False)


def test_a_recipe_may_begin_with_a_mark_of_its_encoding(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbffamily: f\nmodels: {a: {grow: }}\n")
    assert read_recipe(path).family == "f"


def test_keys_by_which_a_section_is_known_may_be_misspelt_and_hide_nothing(recipe):
    found = problems(
        recipe("""
        family: f
        data:
          d: {sorce: text, path: d.txt, documnet: line}
          m: {mxi: {d: 1, dd: 1}}
        models:
          a: {pretrain: {data: d, size: 60k, tokenizer: {sise: 512}}}
          b: {pretrain: {data: d.trian, hidden: 32, layers: 1}}
        evaluate:
          - {mesure: bits_per_byte, on: [e.test]}
          - {measure: bits_per_byte, on: [d.tset], limt: 3}
        """)
    )
    assert [problem.split(": ", 1)[1].partition("; there are")[0] for problem in found] == [
        "data.d.sorce: unknown key (did you mean 'source'?)",
        "data.d.documnet: unknown key (did you mean 'document'?)",
        "data.m.mxi: unknown key (did you mean 'mix'?)",
        "data.m.mix.dd: unknown data set 'dd' (did you mean 'd'?)",
        "models.a.pretrain.tokenizer.sise: unknown key (did you mean 'size'?)",
        "models.b.pretrain.data: unknown data set 'd.trian' (did you mean 'd.train'?)",
        "evaluate.0.mesure: unknown key (did you mean 'measure'?)",
        "evaluate.0.on.0: unknown data set 'e.test'",
        "evaluate.1.limt: unknown key (did you mean 'limit'?)",
        "evaluate.1.on.0: unknown data set 'd.tset' (did you mean 'd.test'?)",
    ]


def test_yaml_is_read_by_its_newer_rules():
    text = "{on: yes, off: [1e-3, 1:30, 007, 0x1f, 1_000, .5, ~, true, 2M tokens]}"
    assert read_yaml(text).value == {
        "on": "yes",
        "off": [0.001, "1:30", "007", 31, 1000, 0.5, None, True, "2M tokens"],
    }


def test_values_can_be_shared_by_anchor_and_keep_the_line_where_they_are_written():
    found = read_yaml("a: &common\n  steps: 3\nb:\n  <<: *common\n  kind: x\n")
    assert found.value["b"] == {"steps": 3, "kind": "x"}
    assert found.line(("b", "steps")) == 2
    assert found.line(("b", "kind", "a branch of a union")) == 5
    assert not found.problems


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "a: !!python/object/apply:os.system ['true']", "? [a, b]\n: 1", "a\tb:\n\t- c", "a: \x07"]
)
def test_yaml_that_would_do_harm_is_a_problem(text):
    assert read_yaml(text).problems


FAMILY = """
family: f
data:
  d: {{source: text, document: line, path: d.txt}}
  pairs: {{source: jsonl, path: p.jsonl, format: pairs}}
models:
  base: {{pretrain: {{data: d, hidden: 32, layers: 2, tokenizer: {{size: 300}}, {base}}}}}
  child: {child}
"""


@pytest.mark.parametrize(
    ("child", "expected"),
    [
        ("{tune: {from: base, data: d, method: {lora: {layers: [0, 5]}}}}", "expected layers of its blocks 0 to 1"),
        ("{tune: {from: base, data: d, method: {lora: {layers: '1:6'}}}}", "blocks 0 to 1, found 1:6"),
        ("{tune: {from: base, data: d, method: {houlsby: {layers: '2:'}}}}", "blocks 0 to 1, found 2:"),
        (
            "{tune: {from: base, data: d, method: {lora: {on: ['*.q_porj']}}}}",
            "expected a place '*.q_porj', found none",
        ),
        ("{tune: {from: base, data: d, method: {lora: {rank: 33}}}}", "expected a rank of at most 32"),
        ("{tune: {from: base, data: d, method: {lora: {rank: 33, pissa: true}}}}", "expected a rank of at most 32"),
        ("{tune: {from: base, data: d, method: bitfit}}", "expected layers with biases, found none"),
        ("{tune: {from: base, data: d, method: {full: {only: ['*.c_attn.*']}}}}", "'*.c_attn.*', which matches none"),
        ("{tune: {from: base, data: d, method: {full: {freeze: ['*']}}}}", "the patterns freeze all of them"),
        (
            "{pretrain: {data: d, size: 1M, architecture: encoder-decoder, tokenizer: {of: base}}}",
            "span corruption needs a tokenizer with sentinels (<extra_id_0>, …); that of base has none",
        ),
        ("{tune: {from: base, data: d, method: {lora: {layers: '-2:'}}}}", None),
        ("{pretrain: {data: d, size: 1M, architecture: encoder, tokenizer: {of: base}}}", None),
        ("{pretrain: {data: pairs, size: 1M, architecture: encoder-decoder, tokenizer: {of: base}}}", None),
    ],
)
def test_what_a_model_that_is_not_made_yet_cannot_take_is_found_before_it_is_made(recipe, tmp_path, child, expected):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"source": "{n}", "target": "b"}}\n' for n in range(200)))
    path = recipe(FAMILY.format(base="length: 32", child=child))
    if expected is None:
        assert list(read_recipe(path).models) == ["base", "child"]
        return
    (problem,) = problems(path)
    assert problem.startswith("line 8: models.child.")
    assert expected in problem


def test_an_adapter_on_a_model_that_is_merged_from_models_not_made_yet_is_tried_as_well(recipe, tmp_path):
    text = FAMILY.format(base="architecture: decoder, positions: learned", child="{tune: {from: base, data: d}}")
    text += "  soup: {merge: {models: [base, child]}}\n"
    text += "  top: {tune: {from: soup, data: d, method: {lora: {on: [up]}}}}\n"
    text += "  over: {tune: {from: top, data: d, method: {lora: {on: [gate_proj]}}}}\n"
    text += "  folded: {tune: {from: top, data: d, method: {lora: {rank: 99}}, fold: true}}\n"
    (tmp_path / "p.jsonl").write_text("".join(f'{{"source": "{n}", "target": "b"}}\n' for n in range(200)))
    first, second = problems(recipe(text))
    assert first.startswith("line 11: models.over.tune: GPT2LMHeadModel: expected a place 'gate_proj', found none")
    assert second.startswith("line 12: models.folded.tune: ")
    assert "expected a rank of at most 32" in second


def test_a_model_without_a_tokenizer_is_not_trained_and_not_measured(recipe, tmp_path):
    folder = tmp_path / "mute"
    build(
        config_for("decoder", "rotary", Shape(32, 2, 4, 300, 32, 0.0, {"bos": 1, "eos": 2, "pad": 0}))
    ).save_pretrained(folder)
    found = problems(
        recipe("""
        family: f
        data:
          d: {source: text, document: line, path: d.txt}
        models:
          mute: {load: mute}
          further: {tune: {from: mute, data: d}}
          fresh: {pretrain: {data: d, size: 1M, tokenizer: {of: mute}}}
        evaluate:
          - {measure: bits_per_byte, on: [d.test]}
        """)
    )
    assert [problem.partition(" has no tokenizer")[0] for problem in found] == [
        "line 7: models.further.tune: mute",
        "line 8: models.fresh.pretrain: mute",
        "line 10: evaluate.0: mute",
    ]


def test_a_tokenizer_in_a_folder_says_what_objectives_it_serves(recipe, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "words")
    (problem,) = problems(
        recipe("""
        family: f
        data:
          d: {source: text, document: line, path: d.txt}
        models:
          left: {pretrain: {data: d, hidden: 32, layers: 1, tokenizer: {path: words}}}
          both: {pretrain: {data: d, hidden: 32, layers: 1, tokenizer: {path: words}, architecture: encoder}}
        """)
    )
    assert problem.startswith("line 7: models.both.pretrain: masked LM needs a tokenizer with a mask token; that of")


def test_what_does_not_parse_hides_nothing_else_of_its_node_or_of_others(recipe):
    found = problems(
        recipe("""
        family: f
        data:
          d: {source: text, document: line, path: d.txt, splits: {dve: 0.1}}
          m: {mix: {d: 1, nothing: 1}, temprature: 2}
        models:
          base: {pretrian: {data: d, hidden: 32, layers: 2, lenght: 64, tokenizer: {size: 300}}}
          low: {tune: {from: base, data: dd, lenght: 8, method: {lora: {rnak: 4, layers: [5]}}}}
          high: {tune: {from: base, data: d, method: {lora: {rank: 64}}}}
          way: {tune: {from: bass, data: d, method: lroa}}
          small: {pretrain: {data: e, size: tiny, tokenizer: {of: bass}}}
          top: {tune: {from: high, data: d, method: {lora: {on: [nowhere]}}}}
          soup: {merge: {method: liner, models: [low, hihg]}}
          duo: {ensemble: {members: [low, hihg], combine: lniear}}
          ring: {tune: {from: gnir, data: d, budgte: 3}}
          gnir: {tune: {from: ring, data: d, method: {full: {freeez: []}}}}
          copy: {load: nowhere}
        """)
    )
    told = [(int(line.removeprefix("line ")), place, rest) for line, place, rest in (p.split(": ", 2) for p in found)]
    assert [(line, place) for line, place, _ in told] == [
        (4, "data.d.splits.dve"),
        (5, "data.m.temprature"),
        (5, "data.m.mix.nothing"),
        (7, "models.base.pretrian"),
        (7, "models.base.pretrian.lenght"),
        (8, "models.low.tune.lenght"),
        (8, "models.low.tune.method.lora.rnak"),
        (8, "models.low.tune.data"),
        (8, "models.low.tune"),
        (9, "models.high.tune"),
        (10, "models.way.tune"),
        (10, "models.way.tune.from"),
        (11, "models.small.pretrain.size"),
        (11, "models.small.pretrain.data"),
        (11, "models.small.pretrain.tokenizer.of"),
        (12, "models.top.tune"),
        (13, "models.soup.merge"),
        (13, "models.soup.merge.models.1"),
        (14, "models.duo.ensemble"),
        (14, "models.duo.ensemble.members.1"),
        (15, "models.ring.tune.budgte"),
        (15, "models.ring"),
        (16, "models.gnir.tune.method.full.freeez"),
        (17, "models.copy.load"),
    ]
    by_place = {place: rest for _, place, rest in told}
    assert "blocks 0 to 1, found [5]" in by_place["models.low.tune"]
    assert "a rank of at most 32" in by_place["models.high.tune"]


def test_a_value_that_was_left_out_is_not_asked_for(recipe):
    found = problems(
        recipe("""
        family: f
        data:
          d: {source: text, document: line, path: d.txt}
        models:
          a: {pretrain: {data: d, size: none, length: short}}
          b: {tune: {from: 3, data: d, learning_rate: -1}}
          c: {tune: {from: a, data: d, method: {lora: {layers: [99]}}}}
        """)
    )
    assert [problem.split(": ")[1] for problem in found] == [
        "models.a.pretrain.size",
        "models.a.pretrain.length",
        "models.b.tune.learning_rate",
        "models.b.tune.from",
    ]


def test_what_does_not_go_together_is_told_beside_what_is_wrong_alone(recipe):
    found = problems(
        recipe("""
        family: f
        data:
          d: {source: text, document: line, path: d.txt}
        models:
          a: {pretrain: {data: d, size: 60k, batch_size: 6, accumulate: 4, track: [trackio], precision: fp8}}
          b: {pretrain: {data: dd, size: 60k, batch_size: 6, accumulate: 4}}
          c: {pretrain: {data: d, size: 60k, batch_size: 6, accumulate: many}}
        """)
    )
    assert [(problem.split(": ")[1], problem.partition(", found")[0].split(": ", 2)[2]) for problem in found] == [
        ("models.a.pretrain.precision", "expected 'fp32', 'bf16' or 'fp16'"),
        (
            "models.a.pretrain.track",
            "the tracker trackio needs the package trackio: pip install 'graft[trackio]'",
        ),
        ("models.a.pretrain", "expected batch_size to be a multiple of accumulate"),
        ("models.b.pretrain", "expected batch_size to be a multiple of accumulate"),
        ("models.b.pretrain.data", "unknown data set 'dd' (did you mean 'd'?); there are: d"),
        (
            "models.c.pretrain.accumulate",
            "expected a valid integer",
        ),
    ]


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


TASK = "name: t\ndata: {source: jsonl, format: raw, test: q.jsonl}\nprompt: '{{ q }}'\ntarget: '{{ a }}'\n"

WRONG_TASKS = {
    "misspelt": (TASK.replace("prompt", "promt"), ["t.yaml, line 3: promt: unknown key (did you mean 'prompt'?)"]),
    "metric": (TASK + "metrics: [blue]\n", ["t.yaml, line 5: metrics: expected metrics among exact_match, "]),
    "no data": (TASK.replace("q.jsonl", "gone.jsonl"), ["t.yaml, line 2: data: ", "gone.jsonl: expected a file"]),
    "field": (TASK.replace("{{ q }}", "{{ qq }}"), ["t.yaml: `prompt`: template '{{ qq }}': 'qq' is undefined"]),
    "template": (
        TASK.replace("{{ q }}", "{{ q"),
        ["t.yaml, line 3: prompt: expected a template (jinja), found '{{ q'"],
    ),
    "choices": (TASK + "choices: [no, yes]\n", ["t.yaml: ", "expected the target to be one of ['no', 'yes']"]),
    "split": (TASK.replace("test: q", "train: q"), ["t.yaml: ", ".test: expected at least one document, found none"]),
    "yaml": ("name: [t\n", ["t.yaml, line 2: this is not YAML"]),
    "list": ("- name\n", ["t.yaml: expected a mapping (name, data, prompt, target, …), found list"]),
    "control": ("name: \x07\n", ["t.yaml: this is not YAML"]),
    "named": (
        TASK.replace("{source: jsonl, format: raw, test: q.jsonl}", "dd.test"),
        ["line 2: data: unknown data set"],
    ),
}


def test_weights_learned_towards_a_task_want_its_dev_data(recipe, tmp_path):
    for name in "qr":
        lines = [f'{{"text": "{name} {number}", "label": "{number % 2}"}}\n' for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    said = """
        family: f
        data:
          whole: {source: jsonl, path: q.jsonl, splits: {dev: 0, test: 0}}
          split: {source: jsonl, train: q.jsonl, dev: r.jsonl}
        models:
          a: {pretrain: {data: whole, size: 1M, tokenizer: {size: 300}}}
          b:
            tune:
              from: a
              tasks: {one: {data: whole, head: classification}, two: {data: split, head: classification}}
              mixing: {learn: {for: [NAME]}}
    """
    (problem,) = problems(recipe(said.replace("NAME", "one")))
    assert problem.startswith("line 12: models.b.tune.mixing.learn: expected dev data for the task one, towards which")
    read_recipe(recipe(said.replace("NAME", "two")))


@pytest.mark.parametrize("name", WRONG_TASKS)
def test_a_task_that_cannot_be_done_is_found_before_anything_runs(recipe, tmp_path, name):
    content, expected = WRONG_TASKS[name]
    (tmp_path / "q.jsonl").write_text('{"q": 1, "a": "x"}\n{"q": 2, "a": "y"}\n')
    (tmp_path / "t.yaml").write_text(content)
    (problem,) = problems(recipe("family: f\nmodels: {a: {grow: }}\nevaluate:\n- {task: t.yaml}\n"))
    assert problem.startswith(f"line 4: evaluate.0.task: {tmp_path}/t.yaml")
    assert all(words in problem for words in expected), problem


def test_all_that_is_wrong_with_a_task_is_told_at_once(recipe, tmp_path):
    wrong = TASK.replace("{{ q }}", "{{ q").replace("q.jsonl", "gone.jsonl") + "metrics: [blue]\nshotz: 1\n"
    (tmp_path / "t.yaml").write_text(wrong)
    found = problems(recipe("family: f\nmodels: {a: {grow: }}\nevaluate:\n- {task: t.yaml}\n"))
    assert sorted(int(p.partition("t.yaml, line ")[2].partition(":")[0]) for p in found) == [2, 3, 5, 6]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def prompt(r: return 1\n", "t.py, line 2: expected Python, found "),
        ("1 / 0\n", "t.py: the file raised ZeroDivisionError: division by zero"),
        ("def prompt(r): return r['word']\n", "t.py: prompt(record) raised KeyError: 'word'; the record has q, a"),
        ("def prompt(r): return r['q']\n", "t.py: `prompt`: expected text, found int '1'"),
        (
            "def prompt(r): return 'x'\ndef choices(r): return []\n",
            "t.py: `choices`: expected something, found an empty",
        ),
    ],
)
def test_a_task_in_python_that_fails_is_found_before_anything_runs(recipe, tmp_path, code, expected):
    (tmp_path / "q.jsonl").write_text('{"q": 1, "a": "x"}\n')
    data = "{'source': 'jsonl', 'format': 'raw', 'test': 'q.jsonl'}"
    (tmp_path / "t.py").write_text(f"task = {{'name': 't', 'data': {data}, 'target': '{{{{ a }}}}'}}\n{code}")
    (problem,) = problems(recipe("family: f\nmodels: {a: {grow: }}\nevaluate:\n- {task: t.py}\n"))
    assert problem.startswith(f"line 4: evaluate.0.task: {tmp_path}/{expected}")


def test_a_task_on_data_of_the_recipe_is_tried_on_them(recipe, tmp_path):
    (tmp_path / "t.yaml").write_text("name: t\ndata: d\nprompt: '{{ txet }}'\ntarget: x\n")
    path = recipe("""
        family: f
        data:
          d: {source: text, document: line, path: d.txt}
        models: {a: {grow: }}
        evaluate: [{task: t.yaml}]
        """)
    (problem,) = problems(path)
    assert "'txet' is undefined; the record has text" in problem
    (tmp_path / "t.yaml").write_text("name: t\ndata: d\nprompt: '{{ text }}'\ntarget: x\n")
    read_recipe(path)


def test_the_template_of_a_classification_names_fields_of_its_records(recipe, tmp_path):
    (tmp_path / "l.jsonl").write_text("".join(f'{{"text": "{n}", "label": "b"}}\n' for n in range(200)))
    path = recipe("""
        family: f
        data:
          l: {source: jsonl, path: l.jsonl}
        models: {a: {grow: }}
        evaluate:
          - {measure: classification, on: [l.test], prompt: "{{ txet }}"}
          - {measure: classification, on: [l.test], prompt: "{{ text"}
          - {measure: classification, on: [l.test], prompt: "{% for n in range(2) %}{{ text }}{% endfor %}"}
        """)
    first, second = problems(path)
    assert first.startswith("line 7: evaluate.0.prompt: expected a template of the fields text, label, found txet in ")
    assert second.startswith("line 8: evaluate.1.prompt: expected a template (jinja), found '{{ text'")


def test_a_model_without_a_size_hides_no_other_problem(recipe, tmp_path):
    (tmp_path / "one.txt").write_text("one\n")
    path = recipe("""
        family: f
        data: {one: {source: text, path: one.txt, splits: {dev: 0, test: 0}}}
        models:
          a: {pretrain: {data: one, length: 16}}
          b: {tune: {from: a, data: one, rate: 1}}
        """)
    found = problems(path)
    assert "line 5: models.a.pretrain: expected `size` (such as 5M), or `hidden` and `layers`, found neither" in found
    assert any(problem.startswith("line 6: models.b.tune") for problem in found)


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
