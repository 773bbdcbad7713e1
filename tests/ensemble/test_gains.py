"""What a mixture would gain, predicted from what each candidate gives alone, against ensembles that are run."""

import json

import numpy as np
import pytest
from test_ensemble_folder import family, letters, lines, made, run  # noqa: F401
from tiny_members import llama
from typer.testing import CliRunner

import graft
from graft import data
from graft.cli import app
from graft.ensemble.gains import gains, mixture
from graft.ensemble.weights import fit_linear
from graft.errors import CannotCombine, RequestError
from graft.evaluate.scorer import Scorer
from graft.models import load, load_tokenizer

NAMES = ["llama", "gpt2", "mistral"]


def random_scores(candidates=3, tokens=400, documents=40, seed=0):
    generator = np.random.default_rng(seed)
    scores = np.log(generator.uniform(0.01, 0.9, (candidates, tokens)))
    return scores, generator.integers(0, 9, (candidates, tokens)), np.sort(generator.integers(0, documents, tokens))


def test_a_mixture_of_scores_is_computed_in_log_space():
    scores = np.array([[-800.0, -1.0, -np.inf], [-801.0, -2.0, -1.0]])
    weights = np.array([0.25, 0.75])
    with np.errstate(under="ignore"):
        expected = [-800 + np.log(0.25 + 0.75 * np.exp(-1)), np.log(0.25 * np.exp(-1) + 0.75 * np.exp(-2)), None]
    assert mixture(scores, weights)[:2] == pytest.approx(expected[:2])
    assert mixture(scores, weights)[2] == pytest.approx(np.log(0.75) - 1)


def test_each_step_adds_the_candidate_that_gains_most_and_is_measured_on_the_other_half():
    scores, best, texts = random_scores()
    found = gains(["a", "b", "c"], scores, best, texts)
    fit, other = scores[:, texts % 2 == 0], scores[:, texts % 2 == 1]
    first = int(fit.mean(1).argmax())
    rest = [place for place in range(3) if place != first]
    second = min(rest, key=lambda place: fit_linear(fit[[first, place]]).loss)
    assert [step.added for step in found.steps[:2]] == ["abc"[first], "abc"[second]]
    weights = fit_linear(fit[[first, second]]).weights
    loss = -np.log(weights @ np.exp(other[[first, second]])).mean()
    assert found.steps[1].loss == pytest.approx(loss)
    assert found.steps[1].gain == pytest.approx(-other[first].mean() - loss)
    assert found.pairs[first, second] == pytest.approx(min(-other[[first, second]].mean(1)) - loss)
    assert found.pairs.tolist() == found.pairs.T.tolist()


def test_the_interval_holds_the_gain_and_shrinks_with_more_documents():
    few = gains(["a", "b"], *random_scores(2, 400, 20)).steps[1]
    many = gains(["a", "b"], *random_scores(2, 40_000, 2000)).steps[1]
    for step in (few, many):
        assert step.low < step.gain < step.high
    assert many.high - many.low < 0.3 * (few.high - few.low)


def test_a_copy_of_a_candidate_gains_nothing():
    scores, best, texts = random_scores(1)
    found = gains(["a", "copy"], np.repeat(scores, 2, 0), np.repeat(best, 2, 0), texts)
    assert found.steps[1].gain == pytest.approx(0, abs=1e-12)
    assert found.correlation[0, 1] == pytest.approx(1)
    assert found.disagreement[0, 1] == 0


def test_the_predicted_gain_is_what_the_ensembles_measure(family):  # noqa: F811
    source = lines(family / "text.jsonl", 60)
    folders = {name: family / name for name in NAMES}
    found = graft.gains(folders, "text.dev", data_sets={"text": source}, root=family)
    records = list(data.open_corpus({"text": data.parse(source)}, "text", family).records("dev"))
    held_out = [record["text"] for record in records[1::2]]

    def loss(folder):
        scored = Scorer(load(folder), load_tokenizer(folder)).documents(held_out)
        return -np.concatenate([each.log_probs for each in scored]).mean()

    before = loss(folders[found.steps[0].added])
    assert found.steps[0].loss == pytest.approx(before, abs=1e-4)
    for number, step in enumerate(found.steps[1:]):
        target, _ = run(family, {"members": step.weights}, name=f"mixed{number}")
        measured = before - (before := loss(target))
        assert step.gain == pytest.approx(measured, abs=1e-4)
    assert found.steps[1].gain > 0


def test_the_command_prints_who_should_join(family):  # noqa: F811
    lines(family / "text.jsonl", 60)
    words = ["gains", *(str(family / name) for name in NAMES), "--on", str(family / "text.jsonl"), "--documents", "20"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "predicted from" in shown.stdout
    printed = CliRunner().invoke(app, [*words, "--json"])
    found = json.loads(printed.stdout)
    assert found["documents"] == 20
    whole = CliRunner().invoke(app, [*words[:-1], "999", "--json"])
    assert json.loads(whole.stdout)["documents"] == 60
    split = CliRunner().invoke(app, [*words[:-3], f"{family / 'text.jsonl'}.train", "--json"])
    assert json.loads(split.stdout)["documents"] < 60
    assert set(found["losses"]) == set(NAMES)
    assert [step["gain"] is None for step in found["steps"]] == [True, False, False]
    assert found["correlation"]["llama"]["llama"] == pytest.approx(1)


def test_models_that_cannot_be_compared_are_refused(family, tmp_path):  # noqa: F811
    source = lines(family / "text.jsonl", 60)
    with pytest.raises(RequestError, match="expected two models or more"):
        graft.gains([family / "llama"], "text.dev", data_sets={"text": source}, root=family)
    other = tmp_path / "other"
    llama().save_pretrained(other)
    tokenizer = letters()
    tokenizer.add_tokens(["th"])
    tokenizer.save_pretrained(other)
    with pytest.raises(CannotCombine, match="cut the text into different tokens"):
        graft.gains([family / "llama", other], "text.dev", data_sets={"text": source}, root=family)
