import importlib.util
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import LENGTH, ByteLoss, Scored, Stops, byte_rows, log, run, settings, tiny_model
from transformers import AutoModelForCausalLM

from graft.data.rows import ListRows
from graft.errors import RequestError, SettingsError, TrainingError
from graft.train import looks


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(steps, batch_size=8, learning_rate=0.01, clip=1.0):
    """The same training as a bare PyTorch loop with a mean loss over the label tokens of the whole batch."""
    model, rows, loss = tiny_model(), byte_rows(), ByteLoss()
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    history = []
    for step in range(steps):
        batch = rows.collate([rows[index] for index in range(step * batch_size, (step + 1) * batch_size)])
        (loss(model, batch) / loss.weight(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        history.append(weights(model).clone())
    return history


CONSTANT = {"schedule": "constant", "warmup": 0}


def test_the_loop_is_a_bare_pytorch_loop(tmp_path):
    # fused and plain AdamW round differently: a few last places of weights of size one
    torch.testing.assert_close(weights(run(tmp_path, CONSTANT)[1]), by_hand(6)[-1], rtol=1e-4, atol=2e-6)


def test_eight_rows_in_pieces_are_eight_rows_at_once(tmp_path):
    """Labels are masked unevenly, so a mean of means would differ; only the order of additions does."""
    at_once = weights(run(tmp_path / "1")[1])
    for pieces in (2, 8):
        in_pieces = weights(run(tmp_path / str(pieces), {"accumulate": pieces})[1])
        torch.testing.assert_close(in_pieces, at_once, rtol=1e-4, atol=2e-6)


def test_checkpointed_gradients_are_the_gradients(tmp_path):
    torch.testing.assert_close(
        weights(run(tmp_path / "a", {"gradient_checkpointing": True})[1]),
        weights(run(tmp_path / "b")[1]),
        rtol=0,
        atol=1e-7,
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_nearly_the_same(tmp_path, precision):
    full, half = run(tmp_path / "a")[0], run(tmp_path / "b", {"precision": precision})[0]
    assert half.metrics["loss"] == pytest.approx(full.metrics["loss"], rel=0.02)


def test_the_average_is_the_formula(tmp_path):
    _, model = run(tmp_path, {**CONSTANT, "ema": 0.5})
    average = weights(tiny_model())
    for step, now in enumerate(by_hand(6), start=1):
        decay = min(0.5, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * now
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/checkpoints/ema")
    torch.testing.assert_close(weights(saved), average, rtol=1e-4, atol=5e-6)
    torch.testing.assert_close(weights(model), by_hand(6)[-1], rtol=1e-4, atol=2e-6)


def test_the_log_has_a_line_a_step_and_the_dev_loss_where_measured(tmp_path):
    dev = byte_rows(20, skip=100)
    result, model = run(tmp_path, {"evaluate_every": 3}, dev=dev)
    steps = [entry for entry in log(tmp_path) if "loss" in entry]
    measured = [entry for entry in log(tmp_path) if "dev_loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in measured] == [3, 6]
    assert set(steps[0]) == {"step", "loss", "tokens", "tokens_per_s", "learning_rate", "grad_norm", "seconds"}
    assert steps[-1]["tokens"] == result.tokens == 6 * 8 * LENGTH
    batch = dev.collate(dev.rows)
    by_brute_force = float(ByteLoss()(model, batch).detach()) / ByteLoss().weight(batch)
    assert result.metrics["dev_loss"] == measured[-1]["dev_loss"] == pytest.approx(by_brute_force, rel=1e-6)


def test_the_last_and_the_best_checkpoints_are_kept_as_whole_models(tmp_path):
    # a rate this high makes the dev loss go down and then up again
    _, model = run(
        tmp_path,
        {"budget": "8 steps", "learning_rate": 0.3, "evaluate_every": 1, "keep": {"last": 2, "best": 2}},
        dev=byte_rows(20, skip=100),
    )
    scores = {entry["step"]: entry["dev_loss"] for entry in log(tmp_path) if "dev_loss" in entry}
    best = sorted(scores, key=lambda step: scores[step])[:2]
    kept = {path.name for path in (tmp_path / "out/checkpoints").iterdir()}
    assert kept == {f"step-{step}" for step in {7, 8, *best}}
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "out/checkpoints/step-8")
    assert torch.equal(weights(last), weights(model))


def test_training_stops_when_the_dev_loss_no_longer_falls(tmp_path):
    """The dev loss of a model that cannot learn (rate of nearly nothing) never falls by 0.5."""
    given = {"budget": "50 steps", "learning_rate": 1e-9, "evaluate_every": 2}
    stop = {"early_stopping": {"patience": 2, "min_delta": 0.5}}
    result, _ = run(tmp_path, {**given, **stop}, dev=byte_rows(20, skip=100))
    assert result.steps == 6
    assert result.metrics["best_step"] == 2


@pytest.mark.parametrize(("least", "steps"), [(0.0, 6), (0.5, 3)])
def test_a_better_dev_loss_is_one_that_is_better_by_min_delta(tmp_path, least, steps):
    scores = Scored([5.0, 4.9, 4.8, 4.7, 4.6, 4.5])
    given = {"evaluate_every": 1, "early_stopping": {"patience": 2, "min_delta": least}}
    result, _ = run(tmp_path, given, objective=scores, dev=byte_rows(8, skip=100))
    assert result.steps == steps
    assert result.metrics["best_dev_loss"] == pytest.approx(5.0 if least else 4.5)


class Noted(ListRows):
    """Dev rows that note which of them are read."""

    def __init__(self, count):
        super().__init__(byte_rows(count, skip=100).rows, shuffle=False)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"evaluate_every": 2, "budget": "2 steps"}, 64),  # a fifth of 2 · 8 rows is less
        ({"evaluate_every": 3, "budget": "3 steps", "batch_size": 160}, 96),  # a fifth of 3 · 160 rows
    ],
)
def test_a_dev_loss_reads_a_fifth_of_the_rows_that_are_trained_on_64_at_least(tmp_path, given, count):
    dev = Noted(120)
    run(tmp_path, given, dev=dev)
    assert dev.read == list(range(count))


class NotesPrecision(ByteLoss):
    """Whether the forward pass runs in half precision, by whether it is of training."""

    def __init__(self):
        self.seen = set()

    def __call__(self, model, batch):
        self.seen.add((model.training, torch.is_autocast_enabled("cpu")))
        return super().__call__(model, batch)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_dev_loss_is_measured_in_the_precision_of_the_training(tmp_path, precision):
    notes = NotesPrecision()
    run(tmp_path, {"precision": precision}, objective=notes, dev=byte_rows(8, skip=100))
    assert notes.seen == {(True, precision == "bf16"), (False, precision == "bf16")}


def test_the_speed_in_the_log_is_tokens_over_the_time_between_two_looks(tmp_path, monkeypatch):
    """With a look behind every step these times share out that of the training."""
    monkeypatch.setattr(looks, "LOOK_S", 0.0)
    result, _ = run(tmp_path)
    entries = log(tmp_path)
    tokens = np.diff([0, *(entry["tokens"] for entry in entries)])
    times = tokens / np.array([entry["tokens_per_s"] for entry in entries])
    assert (times > 0).all()
    assert times.sum() <= result.metrics["seconds"]


class Breaks(ByteLoss):
    """NaN from the third step on."""

    calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        return super().__call__(model, batch) * (float("nan") if self.calls > 2 else 1.0)


def test_a_loss_that_is_nan_stops_with_its_step_and_leaves_the_last_good_state(tmp_path):
    with pytest.raises(TrainingError, match=r"step 3: expected a finite loss .* found loss nan.*learning rate"):
        run(tmp_path, {"checkpoint_every": "1 step"}, objective=Breaks())
    assert [p.name for p in sorted((tmp_path / "scratch").iterdir())] == [
        "state-000000001.safetensors",
        "state-000000002.safetensors",
    ]
    assert [entry["step"] for entry in log(tmp_path)] == [1, 2]


def masked(rows):
    return [{**row, "labels": np.full_like(row["labels"], -100)} for row in rows]


def test_nothing_but_masked_labels_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="all of them masked in all 64 rows; look at the format"):
        run(tmp_path, rows=ListRows(masked(byte_rows().rows)))


def test_a_step_of_masked_labels_changes_nothing(tmp_path):
    rows = byte_rows(16).rows
    with_masked = ListRows([*rows[:8], *masked(rows[:8]), *rows[8:]], shuffle=False)
    constant = {**CONSTANT, "budget": "3 steps"}
    _, model = run(tmp_path / "a", constant, rows=with_masked)
    _, without = run(tmp_path / "b", {**constant, "budget": "2 steps"}, rows=ListRows(rows, shuffle=False))
    assert torch.equal(weights(model), weights(without))
    assert [entry["step"] for entry in log(tmp_path / "a")] == [1, 3]


def test_frozen_parameters_stay_and_all_frozen_is_refused(tmp_path):
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    run(tmp_path / "a", model=model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    with pytest.raises(TrainingError, match="found all of them frozen"):
        run(tmp_path / "b", model=tiny_model().requires_grad_(False))


@pytest.mark.parametrize("given", [{"keep": {"best": 1}}, {"early_stopping": {"patience": 1}}])
def test_a_best_without_dev_rows_is_refused(tmp_path, given):
    with pytest.raises(RequestError, match="need dev rows to measure on"):
        run(tmp_path, given)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_whose_package_is_missing_is_refused_with_the_command_that_installs_it(monkeypatch, tracker):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=rf"pip install 'graft\[{tracker}\]'"):
        settings(track=[tracker])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_training_is_the_plain_one_goes_on_exactly_and_is_saved_plainly(tmp_path, monkeypatch):
    given = {"budget": "3 steps", **CONSTANT}
    _, plain = run(tmp_path / "plain", given)
    monkeypatch.setattr(ByteLoss, "whole", True)
    given |= {"compile": True, "checkpoint_every": "1 step", "keep": {"last": 1}}
    _, compiled = run(tmp_path / "whole", given)
    torch.testing.assert_close(weights(compiled), weights(plain), atol=1e-5, rtol=1e-4)
    with pytest.raises(Stops):
        run(tmp_path / "killed", given, objective=Scored([], stop=3))
    _, again = run(tmp_path / "killed", given)
    assert torch.equal(weights(again), weights(compiled))
    (kept,) = (tmp_path / "killed" / "out" / "checkpoints").glob("step-*")
    assert set(load_file(kept / "model.safetensors")) == set(load_file(saved(plain, tmp_path) / "model.safetensors"))


def saved(model, folder):
    model.save_pretrained(folder / "saved")
    return folder / "saved"


def test_tensorboard_gets_the_losses_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, {"track": ["tensorboard"], "budget": "4 steps"})
    files = (tmp_path / "out").rglob("events.out.tfevents.*")
    (told,) = (events for path in files if "loss" in (events := EventAccumulator(str(path)).Reload()).Tags()["scalars"])
    losses = [entry["loss"] for entry in log(tmp_path) if "loss" in entry]
    assert [event.value for event in told.Scalars("loss")] == pytest.approx(losses)
    assert [event.step for event in told.Scalars("loss")] == [1, 2, 3, 4]


def test_a_training_that_goes_on_says_from_where(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GRAFT_QUIET", raising=False)
    with pytest.raises(Stops):
        run(tmp_path, {"checkpoint_every": "2 steps"}, objective=Scored([], stop=4))
    assert "going on" not in capsys.readouterr().err
    run(tmp_path, {"checkpoint_every": "2 steps"})
    assert "going on from step 2 of 6" in capsys.readouterr().err


def test_tensorboard_is_told_every_step_once_though_a_killed_run_was_ahead_of_its_state(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(looks, "LOOK_S", 0.0)
    given = {"track": ["tensorboard"], "checkpoint_every": "2 steps"}
    with pytest.raises(Stops):
        run(tmp_path, given, objective=Scored([], stop=4))
    run(tmp_path, given)
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("events.out.tfevents.*") if "loss" in tags(path)}
    told = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in told.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in told.Scalars("loss")] == pytest.approx([entry["loss"] for entry in log(tmp_path)])


def tags(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(path)).Reload().Tags()["scalars"]


class PressesCtrlC(ByteLoss):
    """Ctrl-C in the middle of the third step."""

    calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__call__(model, batch)


def test_ctrl_c_saves_the_state_and_going_on_gives_the_same_bytes(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        run(tmp_path / "a", objective=PressesCtrlC())
    assert log(tmp_path / "a")[-1]["step"] in (3, 4)
    _, model = run(tmp_path / "a")
    assert torch.equal(weights(model), weights(run(tmp_path / "b")[1]))
    assert [entry["step"] for entry in log(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]
    first, second = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "out/log.jsonl").read_text().splitlines()]
        for name in "ab"
    )
    assert first == second
