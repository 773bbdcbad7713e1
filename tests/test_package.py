"""What is installed is whole: all code, all data that stands beside it, and the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import graft

ROOT = Path(__file__).resolve().parents[1]


def files_in(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where `pip install .` has put a copy of the checkout; without its dependencies, and without the network."""
    place = tmp_path_factory.mktemp("package")
    pytest.importorskip("setuptools")
    left = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", place / "checkout" / "src", ignore=left)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "checkout")
    words = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", place / "installed"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, place / "checkout"], capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 0, done.stderr
    return place / "installed"


def test_everything_beside_the_code_is_installed_with_it(installed):
    there = files_in(installed / "graft")
    assert there == files_in(ROOT / "src" / "graft")
    assert {"py.typed", "report/templates/report.css", "report/templates/report.html.j2"} <= there


def test_the_command_is_installed_and_is_this_version(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    run = {"capture_output": True, "text": True, "check": True, "env": environment, "cwd": tmp_path}
    made = subprocess.run([installed / "bin" / "graft", "--version"], **run)
    assert made.stdout == f"graft {graft.__version__}\n"
    where = subprocess.run([sys.executable, "-c", "import graft; print(graft.__file__)"], **run)
    assert Path(where.stdout.strip()).is_relative_to(installed)
