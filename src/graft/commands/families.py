"""A whole family: run, planned, drawn, reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graft._telling import tidy
from graft.commands.options import Device, Force, Json, Launch, Only, Out, RecipeFile, Verify, Wait, answered, shown
from graft.errors import Unfinished


@tidy
def run(
    recipe: RecipeFile,
    out: Out = None,
    only: Only = None,
    force: Force = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Models made side by side, if independent.")] = 1,
    launch: Launch = None,
    wait: Wait = True,
    verify: Verify = False,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Run a recipe: make what is missing, measure everything, write the report.

    Example: [bold]graft run family.yaml --jobs 2[/bold]
    """
    from graft import report as reports
    from graft.plan import plain, render
    from graft.run import run as run_recipe

    failed: Unfinished | None = None
    try:
        done = run_recipe(
            recipe, out, only=only or [], force=force or [], dry_run=dry_run, jobs=jobs, launch=launch, wait=wait,
            verify=verify, device=device,
        )  # fmt: skip
    except Unfinished as error:
        done, failed = error.done, error
    if dry_run:
        typer.echo(json.dumps(plain(done.plan))) if json_ else shown(render(done.plan))
        return
    if json_:
        answer = {"folder": str(done.folder), "made": done.made, "cached": done.cached, "report": str(done.report)}
        answered(answer | reports.summary(done.folder), failed)
    else:
        shown(reports.table(done.folder))
        typer.echo(f"report: {done.report}")
    if failed is not None:
        raise failed


@tidy
def plan(
    recipe: RecipeFile,
    out: Out = None,
    only: Only = None,
    force: Force = None,
    verify: Verify = False,
    fit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Say what fits into this memory, such as 24GB, and what would help."),
    ] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Say what each training holds in memory.")] = False,
    json_: Json = False,
) -> None:
    """Show what a run would do: what is there already; size, memory and time of the rest.

    Example: [bold]graft plan family.yaml --fit 24GB[/bold]
    """
    from graft.api import plan as make
    from graft.plan import fit as room
    from graft.plan import plain, render, render_memory

    found = make(recipe, out, only=only or [], force=force or [], verify=verify)
    told = room.fits(found, room.memory_limit(fit)) if fit is not None else []
    if json_:
        typer.echo(json.dumps(plain(found) | ({"fit": [each.plain() for each in told]} if fit is not None else {})))
    else:
        shown(render(found))
        if memory:
            shown(render_memory(found))
        if fit is not None:
            typer.echo("\n".join(map(room.told, told)) or "everything is made already: nothing is left to fit anywhere")
    for wrong in filter(None, [*found.damaged, room.too_large(found) if fit is None else ""]):
        typer.echo(wrong, err=True)


@tidy
def tree(
    place: Annotated[Path, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe, a run's folder, a model's folder.")],
    json_: Json = False,
) -> None:
    """Draw the family of a recipe, of a run, or of one model with its ancestors.

    Example: [bold]graft tree runs/quickstart/models/duo[/bold]
    """
    from graft import tree as trees

    family = trees.family_of(place)
    typer.echo(json.dumps(trees.plain(family))) if json_ else shown(trees.render(family, str(place)))


@tidy
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a run.")], json_: Json = False
) -> None:
    """Print the table of a run and write its report.html.

    Example: [bold]graft report runs/quickstart[/bold]
    """
    from graft import report as reports

    page = reports.write_report(folder)
    if json_:
        typer.echo(json.dumps(reports.summary(folder)))
        return
    shown(reports.table(folder))
    typer.echo(f"report: {page}")
