"""The table of all methods says what their settings say, and the guide has it as it is."""

import json
from pathlib import Path

from typer.testing import CliRunner

from graft.cli import app
from graft.merge import VERB
from graft.merge.table import markdown
from graft.methods import method_names

GUIDE = Path(__file__).parents[2] / "docs" / "merging.md"


def test_every_method_has_a_row_that_says_what_it_needs():
    told = CliRunner().invoke(app, ["merge", "--methods", "--json"])
    assert told.exit_code == 0, told.output
    rows = {row["method"]: row for row in json.loads(told.stdout)}
    assert list(rows) == sorted(method_names("graft.merge"))
    assert rows["ties"]["needs"] == "models with weights, base"
    assert rows["ties"]["options"] == "density: 0.5, scale: 1, normalise: true, trim: tensor"
    assert rows["slerp"]["needs"] == "two models"
    assert rows["nearswap"] == rows["nearswap"] | {"needs": "one model, base", "options": "t"}
    assert rows["fisher"]["needs"] == "models with weights, text (on), causal language models"
    assert rows["greedy_soup"]["needs"] == "models, held-out data (on)"
    assert rows["checkpoints"]["needs"].endswith("held-out data (on, optional)")
    assert "a seed" in rows["della"]["needs"]
    assert "any initialisation" in rows["rebasin"]["needs"]
    assert "on: none" in rows["extract_lora"]["options"]
    assert all(row["does"] for row in rows.values())


def test_whoever_leaves_out_what_a_row_says_is_needed_is_told():
    for row in VERB.methods({}):
        given = {"method": row["method"], "models": ["a"] if row["needs"].startswith("one") else ["a", "b"]}
        given |= {"base": "c"} if "base" in row["needs"] else {}
        given |= {"on": "d.dev"} if "(on" in row["needs"] else {}
        given |= {"models": ["a", "b"]} if row["needs"].startswith("two") else {}
        given |= {option: 0.5 for option in row["options"].split(", ") if option and ":" not in option}
        if row["method"] == "checkpoints":
            given |= {"of": "a", "models": [], "best": 1}
        if row["method"] == "extract_lora":
            # one of two options has to be there
            given |= {"on": ["*"], "rank": 4}
        assert VERB.parse(given).method == row["method"]


def test_the_guide_has_the_table_as_it_is_and_every_method_with_its_formula():
    said = GUIDE.read_text()
    assert markdown(VERB.methods({})) in said
    explained = said.partition("## Every method at a glance")[0]
    for name in method_names("graft.merge"):
        assert f"`{name}`" in explained
