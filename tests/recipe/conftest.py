"""A recipe to be written, beside data."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, beside a text of two hundred lines (`d.txt`)."""
    (tmp_path / "d.txt").write_text("".join(f"line {n}\n" for n in range(200)))

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def on_lines(recipe):
    """Writes a recipe with one data set `d`, the lines of `d.txt`, from `models:` (line 5) on."""
    head = "\nfamily: f\ndata:\n  d: {source: text, document: line, path: d.txt}\n"
    return lambda models: recipe(head + textwrap.dedent(models).lstrip("\n"))
