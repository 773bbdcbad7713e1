"""Methods that read data from the command line, through a kill; on adapters; and refusals before anything is read."""

import json

import pytest
import readers
import torch
from readers import job
from small_adapters import adapter, folded
from small_family import tensors
from typer.testing import CliRunner

import graft.merge._fisher as fisher
import graft.merge._grams as grams
import graft.merge._parameters as parameters
from graft import models
from graft.cli import app
from graft.errors import CannotCombine
from graft.merge import VERB

READING = {
    "fisher": {},
    "regmean": {},
    "regmean_plus": {},
    "adamerging": {"base": "base", "steps": 2, "learning_rate": 0.02},
    "localize_and_stitch": {"base": "base", "steps": 2, "density": 0.2},
    "tsv_merge": {"base": "base", "on": None},
    "iso_c": {"base": "base", "on": None},
    "wudi": {"base": "base", "on": None},
    "knots": {"base": "base", "on": None},
}


@pytest.fixture(scope="module")
def adapters(reading_root, tuned):
    """Two adapters on the base, and the models that they are: name → folder."""
    made = {"base": tuned["base"]}
    for seed, kind in enumerate(("low", "high")):
        made[kind] = adapter(tuned["base"], reading_root / f"{kind}-adapter", seed, r=2 + seed)
        whole = models.load(tuned["base"])
        whole.load_state_dict(folded(tuned["base"], made[kind]))
        made[f"{kind} whole"] = readers.save(whole, reading_root / f"{kind}-whole")
    return made


@pytest.mark.parametrize("method", READING)
def test_adapters_are_merged_as_the_models_that_they_are(method, adapters, reading_root, texts, tmp_path):
    settings = {"method": method, "models": ["low", "high"], "on": "all", "length": 17} | READING[method]
    if settings["on"] is None:
        settings = {key: value for key, value in settings.items() if key not in ("on", "length")}
    made = job(settings, adapters, texts, reading_root, tmp_path / "adapters")
    plain = {"base": adapters["base"]} | {kind: adapters[f"{kind} whole"] for kind in ("low", "high")}
    whole = job(settings, plain, texts, reading_root, tmp_path / "whole")
    for each in (made, whole):
        VERB.run(each)
    one, other = tensors(tmp_path / "adapters"), tensors(tmp_path / "whole")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("method", [name for name, settings in READING.items() if settings.get("on", "all")])
def test_models_that_may_not_be_merged_are_refused_before_anything_is_read(
    method, tuned, reading_root, texts, tmp_path, monkeypatch
):
    def never(*_):
        raise AssertionError("a model was loaded")

    for module in (fisher, grams, parameters):
        monkeypatch.setattr(module, "load", never)
    stranger = readers.model()
    torch.manual_seed(99)
    stranger.init_weights()
    with torch.no_grad():
        for weight in stranger.parameters():
            weight.copy_(0.02 * torch.randn_like(weight))
    own = tuned | {"low": readers.save(stranger, tmp_path / "stranger")}
    settings = {"method": method, "models": ["high", "low"], "on": "all", "length": 17} | READING[method]
    with pytest.raises(CannotCombine, match="different initialisations"):
        VERB.run(job(settings, own, texts, reading_root, tmp_path / "out"))


def words(tuned, reading_root, method, *more):
    pair = [str(tuned[kind]) for kind in ("low", "high")]
    return ["merge", *pair, "--method", method, "--on", str(reading_root / "all.jsonl"), "--length", "17", *more]


def invoke(*given):
    return CliRunner().invoke(app, [str(word) for word in given])


def test_one_command_reads_a_file(tuned, reading_root, texts, tmp_path):
    verb, *rest = words(tuned, reading_root, "regmean", "--tokens", "170")
    done = invoke(verb, tmp_path / "made", *rest, "--json")
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "made" / "graft.json").read_text())
    assert manifest["notes"]["merged_by_regression"] == 15
    assert [use["split"] for use in manifest["data"]] == ["train"]
    assert manifest["settings"]["tokens"] == 170
    pair = [tuned["low"], tuned["high"]]
    each = json.dumps({str(tuned[kind]): str(reading_root / f"{kind}.jsonl") for kind in ("low", "high")})
    done = invoke("merge", tmp_path / "each", *pair, "--method", "regmean", "--on", each, "--length", "17", "--json")
    assert done.exit_code == 0, done.output
    uses = json.loads((tmp_path / "each" / "graft.json").read_text())["data"]
    assert sorted(use["name"].rpartition("/")[2] for use in uses) == ["high.jsonl", "low.jsonl"]
    wrong = invoke("merge", tmp_path / "no", *pair, "--method", "fisher", "--on", "nowhere.txt")
    assert wrong.exit_code == 2
    assert "nowhere.txt" in wrong.stderr


@pytest.mark.slow
def test_learning_that_is_killed_goes_on_and_ends_the_same(tuned, reading_root, texts, tmp_path, beside):
    """kill -9 in the middle of learning λ."""
    verb, *rest = words(tuned, reading_root, "adamerging", "--base", str(tuned["base"]), "--steps", "60")
    whole = invoke(verb, tmp_path / "whole", *rest)
    assert whole.exit_code == 0, whole.output
    out = tmp_path / "there" / "killed"
    process = beside.start("from graft.cli import main; main()", verb, out, *rest)
    state = out.parent / ".graft" / "work" / "killed" / "scratch" / "lambdas.json"
    process.kill_when(lambda: state.is_file() and json.loads(state.read_text())["step"] > 5)
    assert 5 < json.loads(state.read_text())["step"] < 60
    again = invoke(verb, out, *rest)
    assert again.exit_code == 0, again.output
    first, second = tensors(tmp_path / "whole"), tensors(out)
    assert all(torch.equal(first[name], second[name]) for name in first)
    notes = [json.loads((folder / "graft.json").read_text())["notes"] for folder in (tmp_path / "whole", out)]
    assert notes[0]["entropy_by_step"] == notes[1]["entropy_by_step"]
