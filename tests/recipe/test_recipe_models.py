"""Models of a recipe that are not made yet, broken, or want what is not there."""

from __future__ import annotations

import pytest
from recipe_problems import problems
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from graft.pretrain.architectures import Shape, build, config_for
from graft.recipe import read_recipe

pytestmark = pytest.mark.usefixtures("growing")


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


def test_a_broken_model_is_a_problem_with_a_line_as_any_other(recipe, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"xx")
    found = problems(recipe("family: f\nmodels:\n  a: {load: broken}\n  b: {grow: {parents: [x]}}\n"))
    assert found[0].startswith("line 3: models.a.load: ")
    assert "expected a safetensors file, found 2 bytes" in found[0]
    assert found[1] == "line 4: models.b.grow.parents.0: unknown model 'x'; there are: a, b"


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


def test_a_model_without_a_tokenizer_is_not_trained_and_not_measured(on_lines, tmp_path):
    folder = tmp_path / "mute"
    build(
        config_for("decoder", "rotary", Shape(32, 2, 4, 300, 32, 0.0, {"bos": 1, "eos": 2, "pad": 0}))
    ).save_pretrained(folder)
    found = problems(
        on_lines("""
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


def test_a_tokenizer_in_a_folder_says_what_objectives_it_serves(on_lines, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "words")
    (problem,) = problems(
        on_lines("""
        models:
          left: {pretrain: {data: d, hidden: 32, layers: 1, tokenizer: {path: words}}}
          both: {pretrain: {data: d, hidden: 32, layers: 1, tokenizer: {path: words}, architecture: encoder}}
        """)
    )
    assert problem.startswith("line 7: models.both.pretrain: masked LM needs a tokenizer with a mask token; that of")


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
