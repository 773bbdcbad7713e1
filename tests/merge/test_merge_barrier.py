"""The lines between the models of a merge: measured when it is made, on data that is named."""

from __future__ import annotations

import pytest
from trained_family import job

import graft.merge
from graft.errors import SettingsError
from graft.merge import VERB, barrier
from graft.merge.telling import lines
from graft.verb import Facts

SETTINGS = {"method": "linear", "models": ["up", "down", "jump"], "barrier": {"on": "all.dev", "points": 3}}


def test_the_lines_run_between_each_two_models_and_their_middle_is_the_mean(merge, trained, measured):
    _, notes = merge(SETTINGS)
    found = notes["barriers"]
    assert (found["metric"], found["on"]) == ("bits_per_byte", ["all.dev"])
    assert [each["between"] for each in found["lines"]] == [["up", "down"], ["up", "jump"], ["down", "jump"]]
    for each in found["lines"]:
        a, b = each["between"]
        mean, _ = merge({"method": "linear", "models": [a, b]}, f"{a}-{b}")
        assert each["shares"] == [0, 0.5, 1]
        assert each["values"] == pytest.approx([measured(trained[a]), measured(mean), measured(trained[b])], rel=1e-4)
        straight = (each["values"][0] + each["values"][2]) / 2
        assert each["barrier"] == pytest.approx(max(each["values"][1] - straight, 0))
    assert sum(line.startswith("barrier on the straight line between") for line in lines(notes)) == 3


def test_a_line_that_was_measured_is_not_measured_again(root, data, trained, tmp_path, monkeypatch):
    pair = SETTINGS | {"models": ["up", "down"]}
    first = VERB.run(job(pair, trained, data, root, tmp_path / "out"))["notes"]["barriers"]
    monkeypatch.setattr(barrier, "line_between", lambda *_: pytest.fail("measured again"))
    assert VERB.run(job(pair, trained, data, root, tmp_path / "out"))["notes"]["barriers"] == first


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": "rebasin"}, "measures the lines itself"),
        ({"models": ["up"]}, "expected two models or more"),
        ({"vocabulary": "union"}, "beside `vocabulary`"),
        ({"part": ["model.layers."]}, "beside `part`"),
        ({"barrier": {"points": 3}}, "expected held-out data"),
        ({"barrier": {"on": "all.dev", "points": 2}}, "greater than or equal to 3"),
    ],
)
def test_what_has_no_line_is_refused_before_anything_is_read(more, words):
    with pytest.raises(SettingsError, match=words):
        VERB.parse(SETTINGS | more)


def test_adapters_have_no_line_of_their_own():
    facts = Facts("decoder", "i", "v", 10, 40, {})
    adapter = Facts("decoder", "i", "v", 10, 40, {}, stored="adapter")
    parsed = graft.merge.VERB.parse(SETTINGS | {"models": ["up", "down"]})
    (problem,) = VERB.check(parsed, {"up": facts, "down": adapter})
    assert problem.startswith("down is stored as adapter: a `barrier` is measured between models of safetensors")
