"""Two processes that find each other as under torchrun (gloo, on loopback) train what one does."""

import json

import tiny
import torch
from safetensors.torch import load_file


def test_two_processes_are_one(tmp_path, beside):
    """Rows are masked unevenly, so the processes' shares of the loss differ; accumulation on top of it."""
    given = {"accumulate": 2, "evaluate_every": 3, "keep": {"last": 1}, "ema": 0.9}
    (tmp_path / "two").mkdir()
    beside.together(tiny.__file__, tmp_path / "two", json.dumps(given))
    two = load_file(tmp_path / "two" / "weights")
    tiny.train_into(tmp_path / "one", given)
    one = load_file(tmp_path / "one" / "weights")
    for name, tensor in one.items():
        # sums of gradients are added in another order
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-6)
    logs = tiny.log(tmp_path / "two"), tiny.log(tmp_path / "one")
    assert len(logs[0]) == len(logs[1]) == 8
    for a, b in zip(*logs, strict=True):
        assert {k: a[k] for k in ("step", "tokens") if k in a} == {k: b[k] for k in ("step", "tokens") if k in b}
        for key in ("loss", "dev_loss", "ema_dev_loss", "grad_norm"):
            assert (key in a) == (key in b)
            assert abs(a.get(key, 0) - b.get(key, 0)) < 1e-4
    assert [p.name for p in sorted((tmp_path / "two/out/checkpoints").iterdir())] == ["ema", "step-6"]
