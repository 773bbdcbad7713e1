"""A recipe is checked whole: every problem at once, each with its line."""

from __future__ import annotations

import pytest
from recipe_problems import problems

from graft.recipe import read_recipe
from graft.verbs import verb_names

pytestmark = pytest.mark.usefixtures("growing")

MISSPELT = "modles: unknown key (did you mean 'models'?); there are: family, seed, data, models, evaluate, report"


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
        "line 11: models.d.grow.steps: expected a whole number, found 'many'",
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


def test_an_unknown_section_does_not_hide_what_else_is_wrong(recipe):
    assert problems(
        recipe("""
        family: f
        modles: {}
        models:
          a: {grow: {parents: [x]}}
        """)
    ) == [
        f"line 3: {MISSPELT}",
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
        "line 3: seed: expected a whole number, found 'many'",
        f"line 4: {MISSPELT}",
    ]


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


def test_a_value_that_was_left_out_is_not_asked_for(on_lines):
    found = problems(
        on_lines("""
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


def test_what_does_not_go_together_is_told_beside_what_is_wrong_alone(on_lines):
    found = problems(
        on_lines("""
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
            "expected a whole number",
        ),
    ]
