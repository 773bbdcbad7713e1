"""Tasks and measures of a recipe, and what they want of data and models."""

from __future__ import annotations

import pytest
from recipe_problems import problems

from graft import evaluate
from graft.evaluate import MEASURES
from graft.recipe import read_recipe

pytestmark = pytest.mark.usefixtures("growing")


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


def test_a_measure_must_fit_the_architecture_of_the_models_it_is_taken_of(on_lines):
    path = on_lines("""
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


def test_of_a_translator_the_measures_that_are_possible_are_named():
    said = evaluate.untakable(evaluate.parse_one({"measure": "perplexity", "on": ["d.test"]}), {"t": "encoder-decoder"})
    possible = ("classification (of labelled data)", "generation (of completion or pairs data)")
    assert f"found t (encoder-decoder): take another `measure` (--measure): {', '.join(possible)}" in said
    assert "bits_per_byte" not in said


def test_of_data_of_another_format_the_measures_that_are_possible_are_named():
    said = evaluate.misfit(evaluate.parse_one({"measure": "spans", "on": ["d.test"]}), "pairs")
    assert said == "expected data of the format spans, found pairs: take bits_per_byte, perplexity, generation"


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


def test_labels_that_a_task_does_not_name_are_found_among_the_first_records(recipe, tmp_path):
    lines = [f'{{"text": "{number}", "label": "{("good", "bad")[number % 2]}"}}\n' for number in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(lines))
    said = """
        family: f
        data: {q: {source: jsonl, path: q.jsonl, splits: {dev: 0.2, test: 0}}}
        models:
          a: {pretrain: {data: q, size: 1M, tokenizer: {size: 300}}}
          b: {tune: {from: a, tasks: {mood: {data: q, head: classification, labels: [good, LABEL]}}}}
    """
    (problem,) = problems(recipe(said.replace("LABEL", "ill")))
    assert problem == "line 6: models.b.tune.tasks.mood.labels: task mood: expected labels among good, ill, found 'bad'"
    read_recipe(recipe(said.replace("LABEL", "bad")))
    read_recipe(recipe(said.replace("LABEL", "bad, neither")))
