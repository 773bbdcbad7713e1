"""One model, made without a recipe: the command of each verb, whose options are the fields of its settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from graft._telling import tidy
from graft._verb_command import legend_of, methods_of, requested, rows_table
from graft.commands.options import Device, Json, Launch, Wait, shown
from graft.errors import RequestError

WORDS = {
    "pretrain": "Train a model from scratch.\n\n"
    "Example: [bold]graft pretrain models/base --data books.jsonl --size 3M --budget '2M tokens'[/bold]\n\n"
    "With settings of the data, as in a recipe: [bold]--data '{path: books.jsonl, splits: {test: 0}}'[/bold]",
    "tune": "Train a model further.\n\n"
    "Example: [bold]graft tune models/coder --from models/base --data code.jsonl --learning-rate 1e-4[/bold]\n\n"
    "Few weights on a frozen model: [bold]graft tune models/low --from models/base --data code.jsonl --method lora "
    "--method.lora.rank 16 --learning-rate 2e-3[/bold]; `--method '{point: {form: bottleneck, on: \\[attention], "
    "size: 32}}'` takes a point of the design space, and `graft tune lora --help` shows a method's settings\n\n"
    "With settings of the data, as in a recipe: [bold]--data '{train: code.jsonl, dev: held-out.jsonl}'[/bold]",
    "adapt": "Put finished adapters together on their model: stacked, averaged, from peft, folded.\n\n"
    "Example: [bold]graft adapt models/both models/language models/task[/bold]",
    "head": "Split one task's head, with the body, out of a model tuned on several.\n\n"
    "Example: [bold]graft head models/topic --from models/multi --task topic[/bold]",
    "merge": "Combine the weights of models into one model.\n\n"
    "Example: [bold]graft merge models/soup models/coder=0.5 models/writer=0.5 --method linear[/bold]\n\n"
    "Led by held-out data: [bold]graft merge models/best models/coder models/writer --method task_arithmetic "
    "--base models/base --search.over.scale '[0.1, 1.5]' --search.on held-out.jsonl[/bold]\n\n"
    "Which method suits these models, and why: [bold]graft merge models/best models/coder models/writer "
    "--base models/base --explain[/bold]\n\n"
    "The spread over seeds: [bold]graft merge models/dare models/coder models/writer --method dare_ties "
    "--base models/base --seeds 5[/bold]",
    "quantize": "Pack a model's linear layers into 8 or 4 bits, or unpack them.\n\n"
    "Example: [bold]graft quantize models/small --from models/base --bits 4[/bold]",
    "ensemble": "Combine the predictions of models: the ensemble is a model too.\n\n"
    "Example: [bold]graft ensemble models/duo models/coder models/writer[/bold]\n\n"
    "With weights fitted to held-out text: [bold]graft ensemble fit models/duo models/coder models/writer "
    "--on held-out.jsonl[/bold]; `--documents`, `--top-k` and `--gate` say how; "
    "--on '{path: held-out.jsonl, limit: 500}' takes settings of the data, as in a recipe\n\n"
    "Who speaks where: [bold]graft ensemble show models/duo --text 'def add(a, b):'[/bold]",
}
"""Help of the command of each verb, in the order in which they are shown."""
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
"""A verb's options are not known before it is."""


def command_of(name: str) -> Callable[..., None]:
    """The command that makes a model by the verb `name`."""

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
            bool,
            typer.Option(
                "--methods",
                help="Print the methods as a table and stop; `tune --methods --from MODEL` counts their parameters in "
                "that model.",
            ),
        ] = False,
        wait: Wait = True,
        launch: Launch = None,
        device: Device = None,
        json_: Json = False,
    ) -> None:
        from graft.one import make_one, told, yaml_file

        if methods:
            rows = methods_of(name, context.args)
            typer.echo(json.dumps(rows)) if json_ else shown(rows_table(rows))
            if not json_ and (legend := legend_of(name)):
                typer.echo(f"\n{legend}")
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

    return command


def _explain(words: list[str], settings: list[str], as_json: bool) -> None:
    """Which merge suits these models and why; nothing is merged."""
    from graft import api

    out, written = requested("merge", words, settings)
    models, known = written.pop("models", []), ("base", "adapters_of", "allow_pickle")
    if idle := [*(name for name in written if name not in known), *(["weights"] if isinstance(models, dict) else [])]:
        raise RequestError(
            f"expected nothing but models and {', '.join(known)} beside --explain, which suggests the rest, found "
            f"{', '.join(idle)}"
        )
    advice = api.explain(list(models), **written)
    told = [f"try first: {advice.method}"]
    told += [f"  because {reason}" for reason in advice.why]
    told += [f"  then: {', '.join(advice.also)}"] if advice.also else []
    if advice.method != "none":
        named = written.pop("base", advice.base)
        base = {"base": named} if advice.base is not None else {}
        options = {**written, **base, "method": advice.method, **advice.settings}
        each = {f"--{name.replace('_', '-')}": str(value) for name, value in options.items()}
        words = [word for name, value in each.items() for word in (name, "true" if value == "True" else value)]
        told.append(shlex.join(["graft", "merge", out, *models, *words]))
    typer.echo(json.dumps(advice.plain()) if as_json else "\n".join(told))
