"""What is made of the text of a module: its docstrings, and its statements as tagged tokens."""

from __future__ import annotations

import ast
import inspect
import io
import keyword
import textwrap
import tokenize
from collections.abc import Iterator

LEAST, MOST = 3, 40
"""Tokens of a statement; shorter and longer ones are left out."""
OPENING = 120
"""Characters of an opening: few enough that a label fits behind it into a short context."""
KINDS = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.OP: "operator"}


def docstrings(code: str) -> Iterator[str]:
    """The docstrings of a module's text, in order, cleaned of their indentation; those under 80 characters left out."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(text) >= 80:
                yield text


def openings(code: str) -> Iterator[str]:
    """The first paragraph of each docstring, on one line and cut at a word's end behind OPENING characters at most."""
    for text in docstrings(code):
        yield textwrap.shorten(text.split("\n\n")[0], OPENING, placeholder="")


def statements(code: str) -> Iterator[dict[str, list[str]]]:
    """`{tokens, tags}` of each statement of a module's text; comments, and tokens over several lines, end one."""
    held: list[tuple[str, str]] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type in KINDS or token.type == tokenize.NAME:
                held.append((token.string, _kind(token)))
            elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
                if LEAST <= len(held) <= MOST and not any("\n" in text or " " in text for text, _ in held):
                    yield {"tokens": [text for text, _ in held], "tags": [kind for _, kind in held]}
                held = []
    except (tokenize.TokenError, SyntaxError):
        return


def _kind(token: tokenize.TokenInfo) -> str:
    """What the token is: of a name also what is done with it there."""
    if token.type != tokenize.NAME:
        return KINDS[token.type]
    if keyword.iskeyword(token.string):
        return "keyword"
    before, behind = token.line[: token.start[1]].rstrip(), token.line[token.end[1] :].lstrip()
    if before.endswith(("def", "class")):
        return "definition"
    if behind.startswith("("):
        return "call"
    return "attribute" if before.endswith(".") else "name"
