"""The command line: `graft COMMAND …`. No behaviour of its own; every command calls the function of the same name."""

from __future__ import annotations

import typer

import graft

app = typer.Typer(no_args_is_help=True, add_completion=False, help=graft.__doc__)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(f"graft {graft.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `graft` command."""
    app()
