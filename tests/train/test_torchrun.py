"""Two processes under torchrun (gloo, on loopback) train what one does."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def torchrun(folder, given):
    folder.mkdir()
    place = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    script = [Path(tiny.__file__), folder, json.dumps(given)]
    command = [sys.executable, "-m", "torch.distributed.run", *place, *script]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "weights")


def test_two_processes_are_one(tmp_path):
    """Rows are masked unevenly, so the processes' shares of the loss differ; accumulation on top of it."""
    given = {"accumulate": 2, "evaluate_every": 3, "keep": {"last": 1}, "ema": 0.9}
    two = torchrun(tmp_path / "two", given)
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
