"""The command line: `graft COMMAND …`. No behaviour of its own; every command calls the function of the same name."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import graft
from graft._telling import Plainly, by_option, tidy
from graft._verb_command import VerbCommand, assigned, methods_of, requested, rows_table
from graft.errors import RequestError, SettingsError, Unfinished

app = typer.Typer(
    cls=Plainly,
    no_args_is_help=True,
    add_completion=False,
    help=graft.__doc__,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

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
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]


def _print(value: Any) -> None:
    """A rich renderable on stdout, as wide as the terminal (or 120 columns where there is none)."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(value)


def _answer(value: dict[str, Any], failed: Unfinished | None) -> None:
    """One JSON value on stdout; where something failed, it is left for what tells of that, beside it."""
    if failed is not None:
        failed.answer = value
    else:
        typer.echo(json.dumps(value))


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


@app.command()
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
        typer.echo(json.dumps(plain(done.plan))) if json_ else _print(render(done.plan))
        return
    if json_:
        answer = {"folder": str(done.folder), "made": done.made, "cached": done.cached, "report": str(done.report)}
        _answer(answer | reports.summary(done.folder), failed)
    else:
        _print(reports.table(done.folder))
        typer.echo(f"report: {done.report}")
    if failed is not None:
        raise failed


@app.command()
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
    json_: Json = False,
) -> None:
    """Show what a run would do: what is there already; size, memory and time of the rest.

    Example: [bold]graft plan family.yaml --fit 24GB[/bold]
    """
    from graft.api import plan as make
    from graft.plan import fit as room
    from graft.plan import plain, render

    found = make(recipe, out, only=only or [], force=force or [], verify=verify)
    told = room.fits(found, room.memory_limit(fit)) if fit is not None else []
    if json_:
        typer.echo(json.dumps(plain(found) | ({"fit": [each.plain() for each in told]} if fit is not None else {})))
    else:
        _print(render(found))
        typer.echo("\n".join(room.told(each) for each in told)) if told else None
    if found.damaged:
        typer.echo("\n".join(found.damaged), err=True)


@app.command()
@tidy
def advise(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of the model to tune.")],
    data: Annotated[str, typer.Option(help="What it is to learn: a file, or the name of a data set of --recipe.")],
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
    _print(table(found))
    typer.echo(f"the recipe that checks it: {write}" if write else found.yaml())


@app.command()
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
    typer.echo(json.dumps(trees.plain(family))) if json_ else _print(trees.render(family, str(place)))


@app.command()
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
    typer.echo(json.dumps(found.plain())) if json_ else _print(kinship.render(found))


@app.command()
@tidy
def deltas(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model that the others were tuned from.")],
    models: Annotated[list[Path], typer.Argument(metavar="MODEL…", help="Folders of tuned models.")],
    on: Annotated[str | None, typer.Option(help="Held-out data: a file, with its split if it has some.")] = None,
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
        typer.echo(each) if isinstance(each, str) else _print(each)
    if page is not None:
        typer.echo(f"pictures: {page}")


@app.command()
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
    _print(reports.table(folder))
    typer.echo(f"report: {page}")


def _explain(words: list[str], settings: list[str], as_json: bool) -> None:
    """Which merge suits these models and why; nothing is merged."""
    from graft import api

    _, written = requested("merge", words, settings)
    said = {name: written[name] for name in ("base", "adapters_of", "allow_pickle") if name in written}
    advice = api.explain(list(written.get("models", [])), **said)
    told = [f"try first: {advice.method} {dict(advice.settings) or ''}".rstrip()]
    told += [f"  because {reason}" for reason in advice.why]
    told += [f"  then: {', '.join(advice.also)}"] if advice.also else []
    typer.echo(json.dumps(advice.plain()) if as_json else "\n".join(told))


def _add_verb(name: str, words: str) -> None:
    """The command of a verb: its options are the fields of its settings."""

    @app.command(
        name, cls=VerbCommand, help=words, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
    )
    @tidy
    def command(
        context: typer.Context,
        settings: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, nested ones with dots.")
        ] = None,
        recipe: Annotated[Path | None, typer.Option(help="Take the data sets of this recipe.")] = None,
        seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
        force: Annotated[bool, typer.Option("--force", help="Make it anew though it is there.")] = False,
        hub: Annotated[bool, typer.Option("--hub", help="Allow the network: models may be ids on the hub.")] = False,
        methods: Annotated[
            bool, typer.Option("--methods", help="Print the methods as a table and stop; with --from on that model.")
        ] = False,
        wait: Wait = True,
        launch: Launch = None,
        device: Device = None,
        json_: Json = False,
    ) -> None:
        from graft.one import make_one, told, yaml_file

        if methods:
            rows = methods_of(name, context.args)
            typer.echo(json.dumps(rows)) if json_ else _print(rows_table(rows))
            return
        if name == "merge" and "--explain" in context.args:
            _explain([word for word in context.args if word != "--explain"], settings or [], json_)
            return
        out, written = requested(name, context.args, settings or [])
        family = yaml_file(recipe) if recipe else {}
        made = make_one(
            name, out, written, data=family.get("data"), root=recipe.parent if recipe else ".", seed=seed, force=force,
            wait=wait, launch=launch, device=device, hub=hub,
        )  # fmt: skip
        if json_:
            typer.echo((made / "graft.json").read_text().strip())
        else:
            typer.echo("\n".join([str(made), *told(made)]))


_add_verb(
    "pretrain",
    "Train a model from scratch.\n\n"
    "Example: [bold]graft pretrain models/base --data books.jsonl --size 3M --budget '2M tokens'[/bold]",
)
_add_verb(
    "tune",
    "Train a model further.\n\n"
    "Example: [bold]graft tune models/coder --from models/base --data code.jsonl --learning-rate 1e-4[/bold]",
)
_add_verb(
    "adapt",
    "Put finished adapters together on their model: stacked, averaged, from peft, folded.\n\n"
    "Example: [bold]graft adapt models/both models/language models/task[/bold]",
)
_add_verb(
    "head",
    "Split one task's head, with the body, out of a model tuned on several.\n\n"
    "Example: [bold]graft head models/topic --from models/multi --task topic[/bold]",
)
_add_verb(
    "merge",
    "Combine the weights of models into one model.\n\n"
    "Example: [bold]graft merge models/soup models/coder=0.5 models/writer=0.5 --method linear[/bold]\n\n"
    "Led by held-out data: [bold]graft merge models/best models/coder models/writer --method task_arithmetic "
    "--base models/base --search.over.scale '[0.1, 1.5]' --search.on held-out.jsonl[/bold]\n\n"
    "Which method suits these models, and why: [bold]graft merge models/best models/coder models/writer "
    "--base models/base --explain[/bold]\n\n"
    "The spread over seeds: [bold]graft merge models/dare models/coder models/writer --method dare_ties "
    "--base models/base --seeds 5[/bold]",
)
_add_verb(
    "quantize",
    "Pack a model's linear layers into 8 or 4 bits, or unpack them.\n\n"
    "Example: [bold]graft quantize models/small --from models/base --bits 4[/bold]",
)
_add_verb(
    "ensemble",
    "Combine the predictions of models: the ensemble is a model too.\n\n"
    "Example: [bold]graft ensemble models/duo models/coder models/writer[/bold]\n\n"
    "With weights fitted to held-out text: [bold]graft ensemble fit models/duo models/coder models/writer "
    "--on held-out.jsonl[/bold]; `--documents`, `--top-k` and `--gate` say how\n\n"
    "Who speaks where: [bold]graft ensemble show models/duo --text 'def add(a, b):'[/bold]",
)


@app.command("eval")
@tidy
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Folders of models.")],
    on: Annotated[list[str] | None, typer.Option("--on", help="Data set (a file, or NAME.SPLIT of --recipe).")] = None,
    measure: Annotated[
        str | None, typer.Option(help="What is measured; bits_per_byte if not given.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the measure or task.")
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
            _print(reports.table(out))
        raise
    typer.echo(json.dumps(rows)) if json_ else _print(reports.table(out))


@app.command()
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


@app.command()
@tidy
def show(
    model: Annotated[Path, typer.Argument(metavar="ENSEMBLE", help="The folder of a mixture.")],
    text: Annotated[str, typer.Option("--text", "-t", help="What is shown.")],
    page: Annotated[Path | None, typer.Option("--html", help="Also write a page that shows all parts.")] = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Show which member of an ensemble speaks at which token.

    Example: [bold]graft show models/duo --text 'def add(a, b):'[/bold]
    """
    from graft.api import show as spoken_in
    from graft.ensemble.show import coloured

    spoken = spoken_in(model, text, page=page, device=device)
    typer.echo(json.dumps(spoken.plain())) if json_ else _print(coloured(spoken))


@app.command()
@tidy
def gains(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Folders of models of one vocabulary.")],
    on: Annotated[str, typer.Option("--on", help="Held-out text (a file, or NAME.SPLIT of --recipe).")],
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
    typer.echo(json.dumps(found.plain())) if json_ else _print(render(found))


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


def main() -> None:
    """Entry point of the `graft` command. `--debug` may stand anywhere."""
    # imports leave very many objects that stay: to look through them for garbage takes longer than some commands do
    gc.set_threshold(100_000)
    # numpy's threads keep their cores busy for a while after each product, others could use them
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    if "--debug" in sys.argv[2:]:
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    app()
