"""Which way of tuning to try first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graft._telling import tidy
from graft.commands.options import DATA_IN_PLACE, Json, shown


@tidy
def advise(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of the model to tune.")],
    data: Annotated[
        str, typer.Option(help=f"What it is to learn: a file, a data set of --recipe, or {DATA_IN_PLACE}.")
    ],
    fit: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory there is, such as 24GB.")] = None,
    share: Annotated[float | None, typer.Option(help="Percent of the parameters that may be trained.")] = None,
    many: Annotated[bool, typer.Option("--many", help="Adapters for many tasks shall share the base.")] = False,
    budget: Annotated[str, typer.Option(help="How long each training of the recipe is.")] = "1 epochs",
    recipe: Annotated[Path | None, typer.Option(help="Take the data sets of this recipe.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write the recipe that checks the advice into this file.")] = None,
    json_: Json = False,
) -> None:
    """Say which way of tuning to try first, on what evidence, and write a recipe that checks it.

    Example: [bold]graft advise models/base --data code.jsonl --fit 24GB --write check.yaml[/bold]
    """
    from graft.advise.shown import table, words
    from graft.api import advise as choose
    from graft.one import yaml_file

    family = yaml_file(recipe) if recipe else {}
    found = choose(
        model, data, fit=fit, share=share, many=many, budget=budget, data_sets=family.get("data"),
        root=recipe.parent if recipe else ".", write=write,
    )  # fmt: skip
    if json_:
        typer.echo(json.dumps(found.plain()))
        return
    typer.echo("\n".join(words(found)))
    shown(table(found))
    typer.echo(f"the recipe that checks it: {write}" if write else found.yaml())
