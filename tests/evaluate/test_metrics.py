"""Metrics by hand and against the libraries they are named after."""

from typing import get_args

import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import f1_score, matthews_corrcoef

from graft.errors import UnknownName
from graft.evaluate.metrics import (
    TEXT_METRICS,
    class_metric,
    exact_match,
    metric_of,
    normalise,
    text_metric,
    token_f1,
)
from graft.evaluate.settings import ClassMetric, TagMetric, TextMetric
from graft.evaluate.tasks import CHOICE_METRICS

OUTPUTS = ["the cat sat on the mat", "hello there", "a b c d e"]
TARGETS = [["the cat sat on a mat"], ["hello here", "hello there you"], ["a b c d e"]]


def value(metric, sums):
    return float(metric.value(sums.sum(0, keepdims=True))[0])


def test_exact_match_ignores_spaces_at_the_ends_only():
    assert exact_match(" Paris\n", ["Paris"]) == 1
    assert exact_match("paris", ["Paris"]) == 0


def test_token_f1_is_squads():
    assert normalise("The  cat, sat!") == "cat sat"
    # found: cat sat mat; wanted: cat sat rug floor: 2 in common
    assert token_f1("the cat sat mat", ["a cat sat rug floor"]) == pytest.approx(2 * 2 / (3 + 4))
    assert token_f1("the", ["a"]) == 1
    assert token_f1("x", ["y", "x"]) == 1


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_are_sacrebleus(name):
    metric, sums = text_metric(name, OUTPUTS, TARGETS)
    most = max(map(len, TARGETS))
    references = [[t[i] if i < len(t) else None for t in TARGETS] for i in range(most)]
    corpus = sacrebleu.corpus_bleu if name == "bleu" else sacrebleu.corpus_chrf
    assert value(metric, sums) == pytest.approx(corpus(OUTPUTS, references).score)
    assert "version" in metric.signature


def test_bleu_of_a_resample_is_bleu_of_the_drawn_items():
    metric, sums = text_metric("bleu", OUTPUTS, TARGETS)
    drawn = float(metric.value(np.array([[2.0, 0.0, 1.0]]) @ sums)[0])
    again = [OUTPUTS[0], OUTPUTS[0], OUTPUTS[2]]
    references = [[TARGETS[0][0], TARGETS[0][0], TARGETS[2][0]]]
    assert drawn == pytest.approx(sacrebleu.corpus_bleu(again, references).score)


def test_rouge_l_by_hand():
    metric, sums = text_metric("rougeL", ["a b c"], [["a x c"]])
    assert value(metric, sums) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["f1_macro", "f1_micro", "mcc"])
def test_class_metrics_are_scikit_learns(name):
    random = np.random.default_rng(0)
    wanted, found = random.integers(0, 4, 80), random.integers(0, 4, 80)
    found[:40] = wanted[:40]
    metric, sums = class_metric(name, found.tolist(), wanted.tolist(), 4)
    expected = {
        "f1_macro": f1_score(wanted, found, average="macro"),
        "f1_micro": f1_score(wanted, found, average="micro"),
        "mcc": matthews_corrcoef(wanted, found),
    }[name]
    assert value(metric, sums) == pytest.approx(expected)


def test_class_metrics_of_a_resample_are_those_of_the_drawn_items():
    wanted, found, drawn = [0, 1, 2, 1], [0, 2, 2, 1], [0, 0, 1, 3]
    for name in ("f1_macro", "mcc"):
        metric, sums = class_metric(name, found, wanted, 3)
        again = [[values[i] for i in drawn] for values in (wanted, found)]
        expected = f1_score(*again, average="macro") if name == "f1_macro" else matthews_corrcoef(*again)
        assert float(metric.value(np.bincount(drawn, minlength=4)[None] @ sums)[0]) == pytest.approx(expected)


def test_statistics_stay_small_with_many_classes():
    _, sums = class_metric("mcc", [5, 7], [5, 6], 150)
    assert sums.shape == (2, 450)


def test_accuracy_counts_the_right_ones():
    metric, sums = class_metric("accuracy", [0, 1, 2, 2], [0, 1, 1, 2], 3)
    assert value(metric, sums) == 0.75


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(UnknownName, match="did you mean 'bleu'"):
        text_metric("blue", OUTPUTS, TARGETS)


def test_every_metric_is_found_again_by_its_name():
    """As models are compared: from statistics that were read from a file."""
    made = {name: text_metric(name, OUTPUTS, TARGETS) for name in TEXT_METRICS}
    made |= {name: class_metric(name, [0, 1, 2, 2], [0, 1, 1, 2], 3) for name in get_args(ClassMetric)}
    for name, (metric, sums) in made.items():
        again = metric_of(name, sums.shape[1])
        assert (again.name, again.unit, again.proportion) == (name, metric.unit, metric.proportion)
        assert value(again, sums) == value(metric, sums)
    assert {name for name in made if made[name][0].proportion} == {"exact_match", "span_exact_match", "accuracy"}


def test_every_metric_that_may_be_asked_for_is_known():
    for name in (*CHOICE_METRICS, *get_args(ClassMetric), *get_args(TextMetric), *get_args(TagMetric), "perplexity"):
        assert metric_of(name, 6).name == name
    with pytest.raises(UnknownName, match="unknown metric 'blue'"):
        metric_of("blue")
