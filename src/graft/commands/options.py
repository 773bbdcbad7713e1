"""What several commands share: their options, and how they print an answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.errors import Unfinished

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, and no progress.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; the accelerator where there is one.")]
Launch = Annotated[
    str | None, typer.Option(help="Train each model by several processes, such as 'torchrun --nproc-per-node 2'.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; runs/FAMILY if not given.")]
Only = Annotated[list[str] | None, typer.Option(help="Only this model and what it needs; may be repeated.")]
Force = Annotated[list[str] | None, typer.Option(help="Make this model anew; may be repeated.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for another run on the folder, or refuse.")]
Verify = Annotated[bool, typer.Option(help="Hash the weights of everything that is there already.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read weights that lie in pickles.")]
DATA_IN_PLACE = "settings as in a recipe, '{path: notes.jsonl, limit: 100}'"
"""What may stand where a data set is named, for the help of options that name one."""
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]


def shown(value: Any) -> None:
    """A rich renderable on stdout, as wide as the terminal (or 120 columns where there is none)."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(value)


def answered(value: dict[str, Any], failed: Unfinished | None) -> None:
    """One JSON value on stdout; where something failed, it is left for what tells of that, beside it."""
    if failed is not None:
        failed.answer = value
    else:
        typer.echo(json.dumps(value))
