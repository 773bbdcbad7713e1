"""Run as a script by every process that a launcher starts: python in_processes.py FOLDER CASES_JSON

Each case has `start`, the model to start from, settings, and `tasks` where there are several; each process has its own
folder below FOLDER/NAME. One of tasks may have `stop`: the forward pass in which its first attempt is killed; and
`settled`: skills that depend on tasks are not drawn.
"""

import contextlib
import importlib
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch


def settled_skills(patch):
    """Poly trains the skills that it would draw on average: processes draw numbers of their own."""
    from torch.distributions import RelaxedBernoulli

    patch.setattr(RelaxedBernoulli, "rsample", lambda self, shape=(): torch.sigmoid(self.logits))


def train_case(folder, case):
    """One training, in this process or with the others."""
    with pytest.MonkeyPatch.context() as patch:
        if case.get("settled"):
            settled_skills(patch)
        return trained(folder, case)


def trained(folder, case):
    several, full = (importlib.import_module(f"tune_tests.{name}") for name in ("test_several", "test_full"))
    if "tasks" not in case:
        return full.run(folder, Path(case["start"]), **case["given"])
    start = lambda: several.VERB.run(several.job(folder, Path(case["start"]), case["tasks"], **case["given"]))  # noqa: E731
    if "stop" in case:
        # the state of all is where the first writes it
        (folder.parent / "scratch").mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        (folder / "scratch").symlink_to("../scratch")
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(several.Stops):
            several.killed_at(patch, case["stop"])
            start()
    result = start()
    (folder / "metrics.json").write_text(json.dumps(result))
    return result


def as_package():
    """The tests beside this file import each other as members of a package."""
    package = types.ModuleType("tune_tests")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules["tune_tests"] = package


if __name__ == "__main__":
    as_package()
    torch.set_num_threads(1)
    for name, case in json.loads(sys.argv[2]).items():
        train_case(Path(sys.argv[1]) / name / os.environ.get("RANK", "0"), case)
