"""Shares learned by gradient: against finite differences, against plain autograd, and what comes of it."""

import pytest
import torch
from small_family import tensors
from trained_family import job, model, save, texts, train

from graft.data.alone import IGNORED
from graft.errors import CannotCombine
from graft.merge import VERB, _learning
from graft.merge._learning import Mix, _batches, _mixture, group_patterns
from graft.models import load
from graft.train.losses import TokenLoss

NAMES = ["up", "down", "wild"]
SETTINGS = {"method": "learned_soup", "models": NAMES, "on": "all.dev", "batch_size": 4, "epochs": 2}


@pytest.fixture
def asked(root, data, trained, tmp_path):
    def make(name="out", **more):
        return job(SETTINGS | more, trained, data, root, tmp_path / name)

    return make


@pytest.fixture
def mixture(asked, trained):
    """A mixture with a group a layer, and one batch of text."""
    from contextlib import ExitStack

    from graft.checkpoint import TensorReader

    made = asked(by_layer=True)
    with ExitStack() as opened:
        readers = [opened.enter_context(TensorReader(trained[name])) for name in NAMES]
        mixed, groups = _mixture(made, made.settings, readers, trained["up"])
        yield mixed, groups, _batches(made, made.settings, mixed.module, trained["up"])[0]


LOGITS = [[0.4, -0.3, -1.0], [-0.2, 0.5, -2.0], [0.1, 0.0, -0.7]]


def test_the_gradient_of_the_shares_is_that_of_finite_differences(mixture):
    mixed, _, batch = mixture
    loss = TokenLoss()
    logits = torch.tensor(LOGITS, requires_grad=True)
    temperature = torch.tensor(1.3, requires_grad=True)
    loss(mixed.at(logits, temperature), batch).backward()

    def value(moved, factor=1.3):
        with torch.no_grad():
            return float(loss(mixed.at(moved, torch.tensor(factor)), batch))

    step = 0.02
    found = torch.zeros_like(logits)
    for place in [(g, m) for g in range(3) for m in range(3)]:
        away = torch.zeros_like(logits)
        away[place] = step
        found[place] = (value(logits + away) - value(logits - away)) / (2 * step)
    # central differences are off by a sixth of the third derivative times the square of the step
    torch.testing.assert_close(logits.grad, found, rtol=0.02, atol=0.02 * float(found.abs().max()))
    slope = (value(logits, 1.3 + step) - value(logits, 1.3 - step)) / (2 * step)
    assert float(temperature.grad) == pytest.approx(slope, rel=0.02)


def test_the_gradient_is_that_of_autograd_with_all_models_in_memory(mixture, trained):
    mixed, groups, batch = mixture
    logits = torch.tensor(LOGITS, requires_grad=True)
    TokenLoss()(mixed.at(logits), batch).backward()

    plain = torch.tensor(LOGITS, requires_grad=True)
    every = [tensors(trained[name]) for name in NAMES]
    weights = {}
    for name in every[0]:
        group = next(i for i, pattern in enumerate(groups) if pattern == "*" or name.startswith(pattern[:-1]))
        shares = plain[group].softmax(-1)
        weights[name] = sum(share * one[name] for share, one in zip(shares, every, strict=True))
    made = load(trained["base"])
    labels = batch["labels"]
    logits_btv = torch.func.functional_call(made, weights, (), _inputs(made, batch)).logits
    shifted = torch.nn.functional.cross_entropy(
        logits_btv[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    shifted.backward()
    torch.testing.assert_close(logits.grad, plain.grad, rtol=1e-4, atol=1e-4)


def _inputs(model, batch):
    from graft.train.attention import model_inputs

    return model_inputs(model, batch)


def test_mixing_keeps_no_tensor_of_a_model():
    weights = torch.tensor([0.2, 0.8], requires_grad=True)
    read = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
    mixed = Mix.apply(weights, lambda model: read[model].clone())
    torch.testing.assert_close(mixed, torch.tensor([2.6, -0.4]))
    assert not mixed.grad_fn.saved_tensors
    mixed.backward(torch.tensor([10.0, 1.0]))
    torch.testing.assert_close(weights.grad, torch.tensor([12.0, 29.0]))


def test_every_layer_is_a_group_and_what_lies_outside_is_the_last():
    names = ["model.embed.weight", "model.layers.0.a", "model.layers.10.a", "model.layers.2.a", "lm_head.weight"]
    assert group_patterns(names) == ["model.layers.0.*", "model.layers.2.*", "model.layers.10.*", "*"]


def loss_of(folder, made):
    loss, model = TokenLoss(), load(folder)
    batches = _batches(made, made.settings, model, folder)
    with torch.no_grad():
        return sum(float(loss(model, b)) for b in batches) / sum(loss.weight(b) for b in batches)


def test_a_learned_soup_leaves_the_bad_model_out_and_is_better_than_equal_shares(merge, asked, trained):
    # long enough for the bad model's share to go
    out, notes = merge(SETTINGS | {"epochs": 8})
    found = notes["learned_soup"]
    (shares,) = found["shares"].values()
    assert sum(shares) == pytest.approx(1)
    assert shares[2] == min(shares) < 0.2
    assert found["losses"][0] > min(found["losses"])
    # the merge is written with shares of the best epoch: rounding in another order aside, that is its loss
    assert loss_of(out, asked()) == pytest.approx(min(found["losses"]), rel=1e-4)
    every = [tensors(trained[name]) for name in NAMES]
    for name, value in tensors(out).items():
        expected = sum(share * one[name].double() for share, one in zip(shares, every, strict=True))
        torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)


def test_shares_by_layer_are_written_layer_by_layer(merge, asked, trained):
    out, notes = merge(SETTINGS | {"by_layer": True})
    shares = notes["learned_soup"]["shares"]
    assert list(shares) == ["model.layers.0.*", "model.layers.1.*", "*"]
    every = [tensors(trained[name]) for name in NAMES]
    for name, value in tensors(out).items():
        own = next(s for pattern, s in shares.items() if pattern == "*" or name.startswith(pattern[:-1]))
        expected = sum(share * one[name].double() for share, one in zip(own, every, strict=True))
        torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)
    assert loss_of(out, asked()) == pytest.approx(min(notes["learned_soup"]["losses"]), rel=1e-4)


def test_an_output_matrix_that_is_the_embeddings_is_mixed_with_them(merge, asked, tmp_path):
    made = train(model(tie_word_embeddings=True), texts("up"), 5, 5e-3)
    tied = {"first": save(made, tmp_path / "first")}
    tied["second"] = save(train(made.train(), texts("down"), 8, 5e-3), tmp_path / "second")
    assert "lm_head.weight" not in tensors(tied["first"])
    out, notes = merge(SETTINGS | {"models": list(tied)}, more=tied)
    losses = notes["learned_soup"]["losses"]
    assert min(losses) < losses[0]
    assert loss_of(out, asked()) == pytest.approx(min(losses), rel=1e-4)
    _, notes = merge({"method": "greedy_soup", "models": list(tied), "on": "all.dev"}, "greedy", more=tied)
    assert notes["greedy_soup"]["decisions"][0]["taken"]


def test_a_temperature_is_learned_and_noted(merge):
    _, notes = merge(SETTINGS | {"temperature": True})
    assert notes["learned_soup"]["temperature"] != 1.0
    assert merge(SETTINGS, "without")[1]["learned_soup"]["temperature"] == 1.0


def test_learning_that_was_killed_ends_with_the_same_shares(asked, monkeypatch):
    whole = VERB.run(asked("whole", epochs=4, temperature=True))["notes"]["learned_soup"]
    keep, kept = _learning._keep, []

    def killed(made, settings, state):
        keep(made, settings, state)
        kept.append(state.epoch)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(_learning, "_keep", killed)
    made = asked("killed", epochs=4, temperature=True)
    with pytest.raises(KeyboardInterrupt):
        VERB.run(made)
    assert VERB.run(made)["notes"]["learned_soup"] == whole
    assert kept == [1, 2, 3, 4]


def test_models_whose_tensors_are_converted_while_loading_are_refused(asked, monkeypatch):
    monkeypatch.setattr(_learning, "stored_names", lambda model, folder: None)
    with pytest.raises(CannotCombine, match="use greedy_soup"):
        VERB.run(asked())
