"""Compiled kernels give the bytes of the plain way, whatever is stored; without them, merges go the plain way."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import relatives, streamed

from graft.errors import CheckpointError
from graft.merge import _compiled, _fused, _random
from graft.merge._blocks import DRAWN

pytest.importorskip("numba")

BASE = {"base": "base"}
SPARSE = BASE | {"models": {"a": 0.5, "b": -0.3, "c": 1.0}, "density": {"a": 0.4, "b": 0.7, "c": 1.0}, "scale": 0.7}
POSITIVE = SPARSE | {"models": {"a": 0.5, "b": 0.3, "c": 0.4}}
METHODS = {
    "linear": {"models": {"a": 0.5, "b": 0.3, "c": 0.4}},
    "slerp": {"models": ["a", "b"], "t": 0.3},
    "karcher": {"models": ["a", "b", "c"]},
    "multislerp": {"models": ["a", "b", "c"]},
    "multislerp of deltas": BASE | {"models": ["a", "b", "c"]},
    "model_stock": BASE | {"models": ["a", "b", "c"]},
    "task_arithmetic": BASE | {"models": {"a": 0.5, "b": -0.3, "c": 1.0}, "scale": 0.7, "normalise": True},
    "ties": SPARSE,
    "ties, positive": POSITIVE,
    "ties, a sum": POSITIVE | {"normalise": False},
    "ties of the whole model": POSITIVE | {"trim": "model", "density": 0.3},
    "dare_linear": SPARSE,
    "dare_linear, a mean": SPARSE | {"normalise": True, "rescale": "none"},
    "dare_ties": POSITIVE,
    "della_linear": SPARSE | {"epsilon": 0.2},
    "della": POSITIVE | {"epsilon": {"a": 0.2, "b": 0.0, "c": 0.1}, "rescale": "none"},
}
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def family(kind, shape, stored):
    """Parents in a stored type: as trained, with many equal values, with nothing that changed, and with an outlier."""
    parents = relatives(3, shape=shape)
    for name, model in parents.items():
        for tensor, values in model.items():
            if kind == "equal":
                values = (values * 8).round() / 8
            elif kind == "unchanged" and name != "base":
                values = parents["base"][tensor].clone()
            elif kind == "outlier" and name == "a":
                values = values.clone()
                values.view(-1)[0] = 1000.0
            model[tensor] = values.to(TYPES[stored])
    return parents


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Machine code is kept for these tests alone; workers of pytest-xdist that share them out have one place for it."""
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_CACHE", str(shared / "kernels" if shared else tmp_path_factory.mktemp("home")))
        _compiled._kernel.cache_clear()
        yield
    _compiled._kernel.cache_clear()


@pytest.fixture
def plainly(monkeypatch):
    """Calls a function with no compiler at hand."""

    def without(function):
        with monkeypatch.context() as patch:
            patch.setattr(_fused, "kernel", lambda *_: None)
            return function()

    return without


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("method", METHODS)
def test_a_kernel_gives_the_bytes_of_the_plain_way(method, stored, tmp_path, plainly, monkeypatch):
    monkeypatch.setattr("graft.merge.stream.PIECE", 3000)
    for place, (kind, shape) in enumerate([("trained", (41, 143)), ("equal", (7, 64)), ("outlier", (3, 2500))]):
        parents = family(kind, shape, stored)
        asked = {"method": method.split(",")[0].split(" ")[0], **METHODS[method]}
        fast = streamed(asked, parents, tmp_path / f"fast{place}", seed=3, dtype=stored)
        slow = plainly(lambda: streamed(asked, parents, tmp_path / f"slow{place}", seed=3, dtype=stored))  # noqa: B023
        for name in fast:
            assert torch.equal(bits(fast[name]), bits(slow[name])), (kind, name)


def bits(values):
    return values.contiguous().view(torch.uint8)


def test_what_did_not_change_stays_as_it_is(tmp_path):
    parents = family("unchanged", (50, 70), "BF16")
    for method in ("task_arithmetic", "ties", "dare_ties", "della"):
        made = streamed(
            {"method": method, "base": "base", "models": ["a", "b", "c"]}, parents, tmp_path / method, dtype="BF16"
        )
        assert torch.equal(made["w"], parents["base"]["w"]), method


def test_kernels_are_what_merges_run(tmp_path, monkeypatch):
    ran = []

    def noted(name, stored, made):
        found = _compiled.kernel(name, stored, made)
        ran.append((name, stored, made, found is not None))
        return found

    monkeypatch.setattr(_fused, "kernel", noted)
    monkeypatch.setattr("graft.merge.stream.Tensors._plainly", None)
    streamed({"method": "linear", "models": ["a", "b"]}, family("", (9, 9), "BF16"), tmp_path / "a", dtype="F32")
    asked = {"method": "ties", "base": "base", "models": ["a", "b"]}
    streamed(asked, family("", (300, 900), "F16"), tmp_path / "b", dtype="F16")
    assert {name for name, *_ in ran} == {"weighted_sum", "magnitudes", "bracketed", "deltas"}
    assert all(found for *_, found in ran)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_named_as_ever(wrong, tmp_path):
    for stored in TYPES:
        parents = family("", (60, 50), stored)
        parents["b"]["w"].view(-1)[2071] = wrong
        for method, more in {"linear": {}, "slerp": {}, "ties": BASE}.items():
            with pytest.raises(CheckpointError, match="b: NaN or Inf in w"):
                asked = {"method": method, "models": ["a", "b"], **more}
                streamed(asked, parents, tmp_path / f"{stored}{method}", dtype=stored)


def test_what_the_type_cannot_hold_is_an_error(tmp_path):
    parents = {name: {"w": torch.full((40, 50), value).half()} for name, value in {"a": 0.0, "b": 6e4}.items()}
    with pytest.raises(CheckpointError, match="values that F16 cannot hold"):
        streamed({"method": "task_arithmetic", "base": "a", "models": {"b": 2.0}}, parents, tmp_path, dtype="F16")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5000), st.integers(1, 400), st.integers(0, 9))
def test_draws_do_not_depend_on_where_they_begin(start, count, seed):
    key = _random.key(seed, "w", "a")
    expected = _random.plain(0, start + count, key)[start:]
    np.testing.assert_array_equal(_random.plain(start, count, key), expected)
    np.testing.assert_array_equal(_fused.draws(start, count, key), expected)


def test_draws_far_along_a_tensor_count_on_in_the_upper_word():
    key, start = _random.key(0, "w", "a"), (1 << 32) * DRAWN // 4 - 70
    np.testing.assert_array_equal(_fused.draws(start, 200, key), _random.plain(start, 200, key))
    assert len(set(_random.plain(start, 200, key).tolist())) == 200


def test_machine_code_is_kept_and_loaded_without_the_compiler(tmp_path):
    text = (
        "import sys; from graft.merge import _compiled\n"
        "assert _compiled.kernel('draws', 'BF16', 'BF16') is not None; print('numba' in sys.modules)"
    )
    env = os.environ | {"GRAFT_CACHE": str(tmp_path)}
    said = [subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, check=True) for _ in range(2)]
    assert [each.stdout.strip() for each in said] == [b"True", b"False"]
    (kept,) = (tmp_path / "kernels").iterdir()
    kept.write_text("damaged")
    again = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr.decode()
    assert again.stdout.strip() == b"True"


def test_where_the_compiler_fails_merges_go_the_plain_way(tmp_path, monkeypatch):
    from numba.core.errors import TypingError

    def fails(*_):
        raise TypingError("of another version")

    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(_compiled, "_compile", fails)
    _compiled._kernel.cache_clear()
    assert _compiled.kernel("weighted_sum", "BF16", "BF16") is None
    made = streamed({"method": "linear", "models": ["a", "b"]}, family("", (9, 9), "BF16"), tmp_path, dtype="BF16")
    assert made["w"].isfinite().all()
    _compiled._kernel.cache_clear()


def test_where_nothing_may_be_kept_there_are_no_kernels(monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", "")
    _compiled._kernel.cache_clear()
    assert _compiled.kernel("draws", "BF16", "BF16") is None
    _compiled._kernel.cache_clear()


def test_all_that_kernels_are_written_in_decides_whether_kept_code_is_theirs():
    folder = Path(_compiled.__file__).parent
    found, ahead = set(), ["_kernels.py"]
    while ahead:
        found.add(name := ahead.pop())
        imported = re.findall(r"^from graft\.merge\.(\w+) import", (folder / name).read_text(), re.M)
        ahead += {f"{one}.py" for one in imported} - found
    assert found == set(_compiled.SOURCES)
