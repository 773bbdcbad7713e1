"""Every command and every line of Python that the guide shows is run, in order, in one empty folder."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROOT = DOCS.parent


def blocks(markdown: str) -> Iterator[tuple[str, str | None, str]]:
    """(language, title, content) of each fenced block."""
    for found in re.finditer(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```', markdown, re.DOTALL | re.MULTILINE):
        yield found[1], found[2], found[3]


def commands(content: str) -> Iterator[list[str]]:
    """The words of each line behind a `$`; a backslash joins lines."""
    for line in content.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield shlex.split(line[2:], comments=True)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_guide_runs(workplace):
    from graft.cli import app

    shown: dict[str, int] = {}
    for language, title, content in blocks((DOCS / "guide.md").read_text()):
        if title:
            Path(title).write_text(content)
        if language == "python":
            exec(compile(content, "guide.md", "exec"), {})
        for words in commands(content) if language == "console" else ():
            assert words[0] == "graft", f"the guide shows a command that is not ours: {shlex.join(words)}"
            result = CliRunner().invoke(app, words[1:], catch_exceptions=True, input="")
            assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"
            shown[words[1]] = shown.get(words[1], 0) + 1
    assert {"run", "plan", "tree", "report", "pretrain", "tune", "merge", "ensemble", "eval", "chat"} <= set(shown)


@pytest.mark.parametrize("page", sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("bench/*.md")]))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_are_read_from_console_blocks():
    text = '```console\n$ graft run a.yaml \\\n   --only "b c"\noutput\n```\n\n```yaml title="x.yaml"\na: 1\n```\n'
    found = list(blocks(text))
    assert [(language, title) for language, title, _ in found] == [("console", None), ("yaml", "x.yaml")]
    assert list(commands(found[0][2])) == [["graft", "run", "a.yaml", "--only", "b c"]]
    assert os.sep not in found[1][1]
