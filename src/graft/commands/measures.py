"""Models measured side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graft._telling import by_option, tidy
from graft._verb_command import assigned
from graft.commands.options import DATA_IN_PLACE, Device, Json, Wait, shown
from graft.errors import RequestError, SettingsError, Unfinished


@tidy
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Folders of models.")],
    on: Annotated[
        list[str] | None, typer.Option("--on", help=f"Data set (a file, NAME.SPLIT of --recipe, or {DATA_IN_PLACE}).")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="What is measured; bits_per_byte if not given.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the measure or task, such as limit=100."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="A task's file; may be repeated.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Take the data sets (and without --on the measures) of this.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of results.jsonl.")] = Path("runs/eval"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    wait: Wait = True,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Measure models side by side on held-out data.

    Example: [bold]graft eval models/coder models/soup --on held-out.jsonl[/bold]
    """
    from graft import report as reports
    from graft.api import evaluate as measure_all
    from graft.one import yaml_file

    family = yaml_file(recipe) if recipe else {}
    asked: list[dict[str, Any]] = [{"task": file} for file in task or []]
    if on:
        asked.append({"measure": measure or "bits_per_byte", "on": on})
    for word in settings or []:
        for one in asked:
            assigned(one, word)
    measures = asked or family.get("evaluate") or []
    if not measures or (measure and not on) or (settings and not asked):
        raise RequestError(
            "expected what to measure on, found nothing: --on FILE, --task FILE or --recipe FILE with measures, as in "
            f"`graft eval {' '.join(models)} --on held-out.jsonl`"
        )
    root = recipe.parent if recipe else "."
    try:
        rows = measure_all(
            models, measures, data_sets=family.get("data"), out=out, root=root, seed=seed, wait=wait, device=device
        )
    except SettingsError as error:
        raise SettingsError([by_option(p) for p in error.problems] if asked else error.problems) from None
    except Unfinished as error:
        error.answer = {"rows": error.done}
        if error.done and not json_:
            shown(reports.table(out))
        raise
    typer.echo(json.dumps(rows)) if json_ else shown(reports.table(out))
