"""Ensembles: who speaks where, and what one would gain before it is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graft._telling import tidy
from graft.commands.options import DATA_IN_PLACE, Device, Json, shown


@tidy
def show(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The folder of a mixture or product, or of adapters with a fusion.")
    ],
    text: Annotated[str, typer.Option("--text", "-t", help="What is shown.")],
    page: Annotated[Path | None, typer.Option("--html", help="Also write a page that shows all parts.")] = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Show which member of an ensemble speaks at which token, or which adapter a fusion listens to.

    Example: [bold]graft show models/duo --text 'def add(a, b):'[/bold]

    Layer by layer, as a page: [bold]graft show models/fused --text 'def add(a, b):' --html fused.html[/bold]
    """
    from graft.api import show as spoken_in
    from graft.ensemble.spoken import Spoken

    spoken = spoken_in(model, text, page=page, device=device)
    if json_:
        typer.echo(json.dumps(spoken.plain()))
        return
    from graft.adapters import listened
    from graft.ensemble import show as ensembles

    shown(ensembles.coloured(spoken) if isinstance(spoken, Spoken) else listened.coloured(spoken))


@tidy
def gains(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Folders of models of one vocabulary.")],
    on: Annotated[
        str, typer.Option("--on", help=f"Held-out text (a file, NAME.SPLIT of --recipe, or {DATA_IN_PLACE}).")
    ],
    documents: Annotated[int, typer.Option(min=2, help="Draw at most so many documents of each data set.")] = 200,
    recipe: Annotated[Path | None, typer.Option(help="Take the data sets of this.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the intervals.")] = 0,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Predict what an ensemble of models would gain, and who should join first, before it is made.

    Example: [bold]graft gains models/coder models/writer --on held-out.jsonl[/bold]
    """
    from graft.api import gains as predict
    from graft.ensemble.gains import render
    from graft.one import yaml_file

    family = yaml_file(recipe) if recipe else {}
    root = recipe.parent if recipe else "."
    found = predict(models, on, documents=documents, data_sets=family.get("data"), root=root, seed=seed, device=device)
    typer.echo(json.dumps(found.plain())) if json_ else shown(render(found))
