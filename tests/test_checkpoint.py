"""Files of weights: what is damaged is found and named, what is written is whole or not there."""

import errno
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from graft.checkpoint import INDEX, SINGLE, TensorReader, TensorWriter, read_headers
from graft.disk import atomic_folder, atomic_write, free_space
from graft.errors import CheckpointError, DiskError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(6, dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
}


def sharded(folder):
    save_file({"a": TENSORS["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_headers_and_tensors_are_those_that_were_saved(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    with TensorReader(tmp_path) as reader:
        assert reader.names == sorted(TENSORS)
        for name, tensor in TENSORS.items():
            assert reader.headers[name].shape == tuple(tensor.shape)
            assert torch.equal(reader.read(name), tensor)
        assert reader.read("a", 5, 3).tolist() == [5, 6, 7]


def test_shards_are_read_as_one(tmp_path):
    sharded(tmp_path)
    assert set(read_headers(tmp_path)) == {"a", "b"}


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing 1 of 2 shards: model-00002-of-00002"):
        read_headers(tmp_path)


def test_a_tensor_that_the_index_promises_must_be_there(tmp_path):
    sharded(tmp_path)
    save_file({"other": TENSORS["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="expected tensor b"):
        read_headers(tmp_path)


def test_an_index_may_not_point_outside(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="file names beside it"):
        read_headers(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 20, -1, -40])
def test_a_truncated_file_is_found_wherever_it_ends(tmp_path, keep):
    save_file(TENSORS, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:keep] if keep else b"")
    with pytest.raises(CheckpointError, match=SINGLE):
        read_headers(tmp_path)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 150), value=st.integers(0, 255))
def test_a_damaged_header_never_gives_anything_but_a_clear_error(tmp_path_factory, place, value):
    folder = tmp_path_factory.mktemp("damaged")
    save_file(TENSORS, folder / SINGLE)
    content = bytearray((folder / SINGLE).read_bytes())
    content[place] = value
    (folder / SINGLE).write_bytes(content)
    try:
        headers = read_headers(folder)
    except CheckpointError as error:
        assert SINGLE in str(error)
    else:
        size = len(content)
        assert all(0 <= h.start <= h.end <= size for h in headers.values())


def test_overlapping_tensors_are_corrupt(tmp_path):
    entries = {
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    head = json.dumps(entries).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(head)) + head + bytes(12))
    with pytest.raises(CheckpointError, match="y overlaps"):
        read_headers(tmp_path)


def test_a_folder_with_pickles_only_says_so(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a pickle, which is not read"):
        read_headers(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing there"):
        read_headers(tmp_path / "nowhere")


NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}


@pytest.mark.parametrize("shard_bytes", [10**9, 50])
def test_what_is_written_in_pieces_from_threads_loads_elsewhere(tmp_path, shard_bytes):
    layout = {"a": ("F32", (3, 4)), "b": ("BF16", (6,)), "c": ("I64", ()), "empty": ("F32", (0, 3))}
    writer = TensorWriter(tmp_path, layout, shard_bytes)
    jobs = []
    for name, tensor in TENSORS.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        jobs += [(name, start, raw[start : start + 5]) for start in range(0, len(raw), 5)]
    threads = [threading.Thread(target=writer.write, args=job) for job in reversed(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= load_file(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert (tmp_path / INDEX).exists() == (shard_bytes == 50)
    assert set(read_headers(tmp_path)) == set(TENSORS)


def test_too_little_room_is_said_before_the_first_byte(tmp_path):
    with pytest.raises(DiskError, match=r"needs 400 TB and the disk has"):
        TensorWriter(tmp_path, {"a": ("F32", (10**14,))})
    assert list(tmp_path.iterdir()) == []


def test_free_space_counts_what_is_written_already(tmp_path):
    free_space(tmp_path, 1)
    with pytest.raises(DiskError):
        free_space(tmp_path, 10**18)


def test_too_little_room_is_told_in_units_that_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=34_816))
    with pytest.raises(DiskError, match=r"needs 263 kB and the disk has 34\.8 kB free"):
        free_space(tmp_path, 262_588)


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(RuntimeError), atomic_folder(target) as part:
        (part / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as part:
        (part / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_an_older_folder_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "made"
    with atomic_folder(target) as part:
        (part / "old").write_text("x")
    with pytest.raises(RuntimeError), atomic_folder(target) as part:
        raise RuntimeError
    assert (target / "old").exists()
    with atomic_folder(target) as part:
        (part / "new").write_text("x")
    assert [p.name for p in target.iterdir()] == ["new"]


def test_weights_may_be_read_by_whom_other_new_files_may_be(tmp_path):
    theirs = tmp_path / "theirs.safetensors"
    theirs.write_bytes(b"x")
    theirs.chmod(0o600)
    with atomic_folder(tmp_path / "made") as part:
        save_file({"a": torch.ones(2)}, part / "model.safetensors")
        (part / "model.safetensors").chmod(0o600)
        os.link(theirs, part / "linked.safetensors")
        (part / "config.json").write_text("{}")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "made").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert modes["linked.safetensors"] == 0o600


def test_of_two_that_make_the_same_folder_the_first_stays(tmp_path):
    target = tmp_path / "made"
    with atomic_folder(target, keep_existing=True) as part:
        (part / "late").write_text("x")
        target.mkdir()
        (target / "first").write_text("x")
    assert [p.name for p in target.iterdir()] == ["first"]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="the disk is full; free some space and run again, nothing is lost"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


WRITERS = {
    "ours": "atomic_write(path, b'x' * 50000)",
    "safetensors": "import torch; from safetensors.torch import save_file; save_file({'a': torch.ones(50000)}, path)",
    "torch": "import torch; torch.save({'a': torch.ones(50000)}, path)",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_real_limit_on_file_size_is_said_whoever_writes(tmp_path, writer):
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from graft.disk import atomic_write, disk_errors\n"
        "from graft.errors import DiskError\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"def write(path):\n    {WRITERS[writer]}\n"
        "def limited(path):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n    write(path)\n"
        "write(Path(sys.argv[1]).with_name('free'))\n"
        "try:\n    with disk_errors(Path(sys.argv[1])): limited(Path(sys.argv[1]))\n"
        "except DiskError as error:\n    print(error)\n"
    )
    path = tmp_path / "file"
    path.write_text("old")
    made = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert f"{path}: " in made.stdout
    assert "larger than this process may write" in made.stdout or "the disk is full" in made.stdout
    assert writer != "ours" or path.read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DiskError, match="may not be written; change its permissions"):
        atomic_write(tmp_path / "locked" / "file", "x")


def test_a_refused_permission_is_named(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(DiskError, match="may not be written"):
        atomic_write(Path(tmp_path / "file"), "x")


def test_what_a_kill_left_beside_goes_when_something_is_made_there_and_what_is_being_made_stays(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    old, young, alive = (tmp_path / f".{name}.part" for name in (f"old.{killed.pid}", f"young.{killed.pid}", "alive.1"))
    for folder in (old, young, alive):
        folder.mkdir()
        (folder / "stream").write_text("x")
    for path in (old, old / "stream", alive, alive / "stream"):
        os.utime(path, (0, 0))
    with atomic_folder(tmp_path / "made"):
        pass
    assert not old.exists()
    assert young.exists()
    assert alive.exists()
