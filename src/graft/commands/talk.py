"""Talking with a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from graft._telling import tidy
from graft.commands.options import Device, Json


@tidy
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, or an id with --hub.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Say this and print the answer.")] = None,
    system: Annotated[str | None, typer.Option(help="System message, for models with a chat template.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    hub: Annotated[bool, typer.Option("--hub", help="Allow the network: MODEL is an id on the hub.")] = False,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Talk with a model, by its chat template or by plain continuation.

    What is said comes from --prompt, or from stdin where that is no terminal.

    Example: [bold]graft chat models/coder --prompt 'def add(a, b):'[/bold]
    """
    from graft.chatting import Talk

    talk = Talk(model, system=system, device=device, hub=hub)
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    for said in _said(prompt):
        pieces = talk.reply(said, **sampling)
        if json_:
            typer.echo(json.dumps({"prompt": said, "answer": "".join(pieces)}))
            continue
        for piece in pieces:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()


def _said(prompt: str | None) -> Iterator[str]:
    """What is said: the prompt, the whole of stdin, or line after line from a terminal."""
    if prompt is not None:
        yield prompt
    elif not sys.stdin.isatty():
        yield sys.stdin.read().rstrip("\n")
    else:
        while True:
            try:
                line = input("> ")
            except EOFError:
                return
            if line.strip():
                yield line
