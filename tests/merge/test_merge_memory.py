"""What a merge holds does not grow with the largest tensor: most memory of a process that merges small, then large."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import graft.merge
from graft.checkpoint import TensorReader, TensorWriter, read_file_headers
from graft.lora import Factors, Lora, Turning
from graft.merge.adapted import AdaptedReader
from graft.merge.engine import stream
from graft.merge.preflight import Layout
from graft.merge.stream import Workers

COLUMNS = 2048


def written(folder, tensors):
    folder.mkdir(parents=True)
    writer = TensorWriter(folder, {name: ("F32", shape) for name, shape in tensors.items()})
    for number, (name, (rows, columns)) in enumerate(tensors.items()):
        row = np.random.default_rng([number, len(folder.name)]).standard_normal(columns).astype(np.float32)
        for at in range(rows):
            writer.write(name, at * row.nbytes, np.roll(row, 7 * at).tobytes())
    writer.close()


def with_lengths_of_rows(root, rows):
    headers = read_file_headers(root / "lora" / "model.safetensors")
    headers |= {"m": replace(headers["m"], shape=(rows,))}
    turning = Turning((Factors("a", "b", 4, 0.1, False),), "m", 1.0, 0)
    return AdaptedReader(Lora(root / "lora", {}, {"w": (turning,)}, {}, headers), root / "base", {})


def peak(root, rows, settings):
    if not root.exists():
        written(root / "base", {"w": (rows, COLUMNS)})
        written(root / "other", {"w": (rows, COLUMNS)})
        written(root / "lora", {"a": (4, COLUMNS), "b": (rows, 4), "m": (1, rows)})
        (root / "out").mkdir()
    parsed = graft.merge.VERB.parse(settings)
    readers = {"base": TensorReader(root / "base"), "a": TensorReader(root / "other")}
    readers["x"] = with_lengths_of_rows(root, rows)
    used = {name: readers[name] for name in parsed.parents}
    plan = Layout({"w": ("F32", (rows, COLUMNS))}, {"w": dict.fromkeys(used, "w")}, {})
    writer = TensorWriter(root / "out", plan.tensors)
    with Workers(2) as workers:
        stream(parsed, 0, plan, used, writer, None, workers)
    writer.close()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


root, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
print(json.dumps([peak(root / str(rows), rows, one) for rows in (600, 9000) for one in settings]))
"""
SETTINGS = [
    {"method": "linear", "models": ["base", "a"]},
    {"method": "ties", "base": "base", "models": ["a"], "density": 0.3},
    {"method": "dare_linear", "base": "base", "models": ["a", "x"]},
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes are what Linux counts in")
def test_memory_does_not_grow_with_the_largest_tensor(tmp_path):
    """One of 74 MB beside one of 5: sums, exact thresholds, and an adapter that needs the lengths of all rows."""
    environment = os.environ | {"GRAFT_CACHE": "", "GRAFT_QUIET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    small, large = max(found[:3]), max(found[3:])
    size = (tmp_path / "9000" / "out" / "model.safetensors").stat().st_size / 1024
    assert large - small < size / 2
