"""Every command and every line of Python that the guide shows is run, in order, in one empty folder."""

from __future__ import annotations

import json
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


def graft(words: list[str]) -> None:
    """Run a command in this process; it has to succeed."""
    from graft.cli import app

    result = CliRunner().invoke(app, words, catch_exceptions=True, input="")
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"


@pytest.mark.slow
def test_what_the_pages_show_runs(workplace):
    """The guide from top to bottom; then the README's example and the page on evaluation on the guide's models."""
    shown = run_guide()
    assert {"run", "plan", "tree", "report", "pretrain", "tune", "merge", "relate", "ensemble", "eval", "chat"} <= shown
    run_readme()
    run_evaluation()
    run_tuning()


def run_guide() -> set[str]:
    shown = set()
    for language, title, content in blocks((DOCS / "guide.md").read_text()):
        if title:
            # little of the interpreter's library is read sooner, and is read by every command
            Path(title).write_text(re.sub(r"packages: \[.+?\]", "packages: [json, email]", content))
        if language == "python":
            exec(compile(content, "guide.md", "exec"), {})
        for words in commands(content) if language == "console" else ():
            assert words[0] == "graft", f"the guide shows a command that is not ours: {shlex.join(words)}"
            graft(words[1:])
            shown.add(words[1])
    return shown


def run_readme() -> None:
    Path("tuned-on-code").symlink_to("runs/little/models/coder")
    Path("tuned-on-mail").symlink_to("runs/little/models/writer")
    Path("notes.jsonl").write_text("".join(json.dumps({"text": f"note {i}: call {i * 7}"}) + "\n" for i in range(80)))
    (recipe,) = [content for language, _, content in blocks((ROOT / "README.md").read_text()) if language == "yaml"]
    Path("mine.yaml").write_text(recipe)
    graft(["run", "mine.yaml"])
    assert {"code", "mail", "soup", "duo"} == {path.name for path in Path("runs/mine/models").iterdir()}


def run_evaluation() -> None:
    things = [{"thing": f"thing {i}", "colour": ("red", "green", "blue")[i % 3]} for i in range(9)]
    Path("colours.jsonl").write_text("".join(json.dumps(thing) + "\n" for thing in things))
    for _, title, content in blocks((DOCS / "evaluate.md").read_text()):
        if title:
            Path(title).write_text(content)
    graft(["eval", "tuned-on-code", "--task", "colours.yaml", "--out", "runs/colours"])
    rows = [json.loads(line) for line in Path("runs/colours/results.jsonl").read_text().splitlines()]
    assert {row["metric"]: row["n"] for row in rows} == {"accuracy": 9, "accuracy_per_byte": 9}


def run_tuning() -> None:
    for language, _, content in blocks((DOCS / "tuning.md").read_text()):
        for words in commands(content) if language == "console" else ():
            graft(words[1:])
        if language == "python":
            exec(compile(content, "tuning.md", "exec"), {})
    assert {"low", "keys", "stacked", "weighted", "whole"} <= {path.name for path in Path("models").iterdir()}


def three_models(folder: Path) -> None:
    """Small random models of one vocabulary, whose tokens are the bytes, in `coder`, `writer` and `base`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    signs = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate(signs)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for seed, name in enumerate(("coder", "writer", "base")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(signs), **shape, **ends)).save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def test_the_page_on_ensembles_runs(workplace):
    three_models(Path("models"))
    for name in ("held-out", "test"):
        lines = [json.dumps({"text": f"{name} line {i}: def add(a, b): return {i % 7}"}) + "\n" for i in range(40)]
        Path(f"{name}.jsonl").write_text("".join(lines))
    for language, _, content in blocks((DOCS / "ensembles.md").read_text()):
        for words in commands(content) if language == "console" else ():
            graft(words[1:])
        if language == "python":
            exec(compile(content, "ensembles.md", "exec"), {})
    made = {"duo", "fitted", "product", "saved", "far", "careful", "gated", "weighed", "both", "bundle"}
    assert made <= {path.name for path in Path("models").iterdir()}
    assert "title=" in Path("fitted.html").read_text()


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
