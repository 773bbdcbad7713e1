"""Moments in 8 bits learn nearly the same, are as small as was said, and go on exactly; what cannot run is refused."""

import importlib.util

import pytest
import tiny
import torch
from tiny import Stops
from torch import nn

from graft.errors import RequestError, SettingsError
from graft.train import eight_bits
from graft.train import optimizer as optimizers
from graft.train.estimate import training_estimate
from graft.train.memory import OPTIMIZER_BYTES
from graft.train.optimizer import adamw, check_optimizer, moments, set_moments

EIGHT = {"optimizer": "adamw_8bit"}


@pytest.fixture(autouse=True)
def _packed():
    pytest.importorskip("bitsandbytes")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stepped(model, settings, steps=5):
    optimizer = adamw(model, settings)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
    return optimizer


def test_small_tensors_keep_32_bits_and_take_the_very_steps_of_adamw():
    torch.manual_seed(0)
    ours, plain = nn.Linear(16, 16), nn.Linear(16, 16)
    plain.load_state_dict(ours.state_dict())
    stepped(ours, tiny.settings(**EIGHT))
    stepped(plain, tiny.settings())
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-5, atol=1e-6)


def test_moments_of_8_bits_are_as_small_as_was_said_and_move_weights_nearly_alike():
    torch.manual_seed(0)
    ours, plain = nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)
    plain.load_state_dict(ours.state_dict())
    start = weights(ours).clone()
    held = moments(stepped(ours, tiny.settings(**EIGHT)))
    stepped(plain, tiny.settings())
    size = sum(t.nbytes for name, t in held.items() if not name.endswith("step"))
    assert size == OPTIMIZER_BYTES["adamw_8bit"] * 256 * 256
    assert held["0.state1"].dtype == torch.uint8
    moved, expected = weights(ours) - start, weights(plain) - start
    assert float(torch.nn.functional.cosine_similarity(moved, expected, 0)) > 0.98


def test_a_training_learns_nearly_the_same(tmp_path):
    full, eight = tiny.run(tmp_path / "a")[0], tiny.run(tmp_path / "b", EIGHT)[0]
    assert eight.metrics["loss"] == pytest.approx(full.metrics["loss"], rel=0.02)
    assert eight.metrics["loss"] != full.metrics["loss"]


def test_a_killed_training_with_moments_of_8_bits_goes_on_with_the_same_bytes(tmp_path):
    given = {**EIGHT, "checkpoint_every": "1 step"}
    with pytest.raises(Stops):
        tiny.run(tmp_path / "cut", given, objective=tiny.Scored([], stop=4))
    _, cut = tiny.run(tmp_path / "cut", given)
    _, whole = tiny.run(tmp_path / "whole", given)
    assert torch.equal(weights(cut), weights(whole))


def test_moments_are_put_back_to_the_bit():
    torch.manual_seed(0)
    model = nn.Linear(256, 256)
    held = {name: t.clone() for name, t in moments(stepped(model, tiny.settings(**EIGHT))).items()}
    other = adamw(model, tiny.settings(**EIGHT))
    set_moments(other, held)
    again = moments(other)
    assert again.keys() == held.keys()
    assert all(torch.equal(again[name], held[name]) for name in held)


def test_a_parameter_without_a_gradient_has_no_moments():
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    optimizer = adamw(model, tiny.settings(**EIGHT))
    model[1].weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert {name.partition(".")[0] for name in moments(optimizer)} == {"1"}


@pytest.mark.parametrize(("name", "instead"), [("paged_adamw", "adamw"), ("paged_adamw_8bit", "adamw_8bit")])
def test_paged_moments_are_refused_on_the_cpu_before_the_first_step(tmp_path, name, instead):
    with pytest.raises(RequestError, match=f"expected a CUDA device.*found the CPU: use `optimizer: {instead}`"):
        tiny.run(tmp_path, {"optimizer": name}, objective=tiny.Scored([], stop=1))


def test_what_the_installed_library_cannot_do_on_a_device_is_refused(monkeypatch):
    class Broken:
        def __init__(self, *_, **__):
            pass

        def step(self):
            raise NotImplementedError("no kernel\nfor it")

    monkeypatch.setattr(optimizers, "_class", lambda name: Broken)
    with pytest.raises(RequestError, match=r"adamw_8bit does not run on cpu.*NotImplementedError: no kernel\)"):
        check_optimizer("adamw_8bit", "cpu")
    check_optimizer("adamw", "cpu")


def test_without_the_library_the_settings_say_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"adamw_8bit needs the package bitsandbytes: pip install 'graft\[quant"):
        tiny.settings(**EIGHT)
    assert tiny.settings().optimizer == "adamw"


def test_the_plan_counts_the_moments():
    said = {name: training_estimate(10**8, tiny.settings(optimizer=name), 64) for name in OPTIMIZER_BYTES}
    memory = {name: estimate.memory_bytes for name, estimate in said.items()}
    assert memory["adamw"] - memory["adamw_8bit"] == pytest.approx((8 - 2.03125) * 10**8, abs=2)
    assert memory["adamw"] - memory["paged_adamw"] == pytest.approx(8 * 10**8, abs=2)
    assert "K = 2 (adamw_8bit)" in said["adamw_8bit"].note


@pytest.mark.gpu
def test_paged_moments_go_on_with_the_same_bytes_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    model = nn.Linear(512, 512).cuda()
    settings = tiny.settings(optimizer="paged_adamw_8bit")
    optimizer = adamw(model, settings)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = {name: t.detach().cpu().clone() for name, t in moments(optimizer).items()}
    other = adamw(model, settings)
    set_moments(other, held)
    assert all(torch.equal(t.cpu(), held[name]) for name, t in moments(other).items())
    assert getattr(other.state[model.weight]["state1"], "is_paged", False)


def codes_of_a_model():
    """Moments of 8 bits behind some steps: the state of one parameter of 96 x 64."""
    torch.manual_seed(0)
    model = nn.Linear(64, 96, bias=False)
    optimizer = stepped(model, tiny.settings(**EIGHT))
    return optimizer.state[model.weight]


def test_codes_come_again_from_numbers_and_their_scales():
    state = codes_of_a_model()
    held = eight_bits.spread(state)
    assert held["state1"].dtype == held["absmax1"].dtype == torch.float32
    assert held["state1"].shape == held["absmax1"].shape == (96, 64)
    again = {name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0 for name, value in state.items()}
    again |= {name: state[name] for name in eight_bits.TABLES.values()}
    eight_bits.put(again, held)
    for name in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(again[name], state[name]), name
    # halves of 48 rows are 12 blocks each: cut so, nothing is lost either
    codes, scales = eight_bits.coded(held["state1"][48:], held["absmax1"][48:], state["qmap1"])
    assert torch.equal(codes, state["state1"][48:])
    assert torch.equal(scales, state["absmax1"][12:])


def test_blocks_that_are_cut_elsewhere_lose_little():
    state = codes_of_a_model()
    held = eight_bits.spread(state)
    rest, scale = held["state1"][1:], held["absmax1"][1:]  # 64 numbers later
    codes, scales = eight_bits.coded(rest, scale, state["qmap1"])
    again = eight_bits.numbers(codes, eight_bits.each(scales, rest), state["qmap1"])
    largest = eight_bits.each(scales, rest)
    assert float(((again - rest).abs() / largest).max()) < 0.02  # half of the table's widest step, at its ends
    assert not torch.equal(again, rest)


def test_moments_of_32_bits_are_read_into_8_and_back():
    state = codes_of_a_model()
    plain = {"state1": torch.zeros(96, 64), "state2": torch.zeros(96, 64)}
    eight_bits.put(plain, state)
    held = eight_bits.spread(state)
    assert torch.equal(plain["state1"], held["state1"])
    assert torch.equal(plain["state2"], held["state2"])
    back = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    eight_bits.put(back, plain)
    error = eight_bits.spread(back)["state2"] - held["state2"]
    assert float(error.abs().max()) < 0.02 * float(held["state2"].max())
