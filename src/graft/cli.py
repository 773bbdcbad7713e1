"""The command line: `graft COMMAND …`. No behaviour of its own: `commands/` has the commands, each of which calls the
function of the same name."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

import typer

import graft
from graft._telling import Plainly
from graft._verb_command import VerbCommand
from graft.commands import advice, ensembles, families, kin, measures, talk, verbs

app = typer.Typer(
    cls=Plainly,
    no_args_is_help=True,
    add_completion=False,
    help=graft.__doc__,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    if debug:
        os.environ["GRAFT_DEBUG"] = "1"
    if version:
        typer.echo(f"graft {graft.__version__}")
        raise typer.Exit


app.command()(families.run)
app.command()(families.plan)
app.command()(advice.advise)
app.command()(families.tree)
app.command()(kin.relate)
app.command()(kin.deltas)
app.command()(families.report)
for _verb, _words in verbs.WORDS.items():
    app.command(_verb, cls=VerbCommand, help=_words, context_settings=verbs.ANY_OPTION)(verbs.command_of(_verb))
app.command("eval")(measures.evaluate)
app.command()(talk.chat)
app.command()(ensembles.show)
app.command()(ensembles.gains)


def main() -> None:
    """Entry point of the `graft` command. `--debug` may stand anywhere."""
    # imports leave very many objects that stay: to look through them for garbage takes longer than some commands do
    gc.set_threshold(100_000)
    # numpy's threads keep their cores busy for a while after each product, others could use them
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    # to look whether another package wants to watch settings being read takes longer than to read them
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")
    if "--debug" in sys.argv[2:]:
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    app()
