"""What models have in common, and what sets them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graft._telling import tidy
from graft._verb_command import assigned
from graft.commands.options import DATA_IN_PLACE, AllowPickle, Device, Json, shown


@tidy
def relate(
    a: Annotated[Path, typer.Argument(metavar="A", help="The folder of a model.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The folder of another one.")],
    seed: Annotated[int, typer.Option(help="Seed of the shuffles that chance is measured by.")] = 0,
    adapters_of: Annotated[
        Path | None, typer.Option(help="The model that adapters stand on, where they do not name it rightly.")
    ] = None,
    allow_pickle: AllowPickle = False,
    json_: Json = False,
) -> None:
    """Say how two models are related and what of them may be combined, and how.

    Example: [bold]graft relate models/coder models/writer[/bold]
    """
    from graft import relate as kinship

    found = kinship.relate(a, b, seed=seed, adapters_of=adapters_of, allow_pickle=allow_pickle)
    typer.echo(json.dumps(found.plain())) if json_ else shown(kinship.render(found))


@tidy
def deltas(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model that the others were tuned from.")],
    models: Annotated[list[Path], typer.Argument(metavar="MODEL…", help="Folders of tuned models.")],
    on: Annotated[
        str | None, typer.Option(help=f"Held-out data: a file, with its split if it has some, or {DATA_IN_PLACE}.")
    ] = None,
    measure: Annotated[str, typer.Option(help="What is measured there.")] = "bits_per_byte",
    limit: Annotated[int, typer.Option(help="At most so many documents or items.")] = 100,
    method: Annotated[str | None, typer.Option(help="A merge to measure there too, beside the mean.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of that merge.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write the pictures into this HTML file.")] = None,
    allow_pickle: AllowPickle = False,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Say what models learned away from their base, layer by layer, and which merge to try first.

    Example: [bold]graft deltas models/base models/coder models/writer --on held-out.jsonl --page deltas.html[/bold]
    """
    from graft import api
    from graft.deltas.page import tables

    merge: dict[str, object] = {"method": method} if method is not None else {}
    for word in settings or []:
        assigned(merge, word)
    found, advice, seen = api.deltas(
        base, models, on=on, measure=measure, limit=limit, merge=merge or None, page=page, allow_pickle=allow_pickle,
        device=device,
    )  # fmt: skip
    if json_:
        told = {"deltas": found.plain(), "advice": advice.plain(), "outcome": seen.plain() if seen else None}
        typer.echo(json.dumps(told))
        return
    for each in tables(found, advice, seen):
        typer.echo(each) if isinstance(each, str) else shown(each)
    if page is not None:
        typer.echo(f"pictures: {page}")
