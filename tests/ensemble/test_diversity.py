"""Correlation and disagreement by hand; the predicted gain against the gain that a run of the ensembles measures."""

import numpy as np
import pytest
import torch
from tiny_members import five, prompts

from graft.ensemble.diversity import disagreement, error_correlation, predicted_gain
from graft.ensemble.model import ensemble_of
from graft.ensemble.weights import fit_linear


def test_candidates_that_err_alike_and_oppositely():
    surprise = np.array([1.0, 2.0, 3.0, 6.0])
    found = error_correlation(-np.stack([surprise, 2 * surprise + 1, -surprise]))
    assert np.allclose(found, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])


def test_disagreement_counts_tokens():
    assert disagreement(np.array([[1, 2, 3, 4], [1, 2, 0, 0]])).tolist() == [[0, 0.5], [0.5, 0]]


@torch.no_grad()
def test_the_predicted_gain_is_the_gain_that_running_measures():
    members = five()
    ids, _ = prompts(8, 12, ())
    gold = ids[:, 1:, None]
    told = [m(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, gold).flatten() for m in members.values()]
    kept = torch.stack(told).double().numpy()
    pair, trio = fit_linear(kept[:2]), fit_linear(kept[:3])
    names = list(members)
    measured = [
        ensemble_of({n: members[n] for n in names[: len(fit.weights)]}, fit.weights.tolist())(input_ids=ids, labels=ids)
        for fit in (pair, trio)
    ]
    gain = predicted_gain(kept, [0, 1], 2)
    assert gain > 0.01
    assert gain == pytest.approx(float(measured[0].loss - measured[1].loss), abs=1e-4)
    with pytest.raises(ValueError, match="none of them"):
        predicted_gain(kept, [0, 1], 1)
