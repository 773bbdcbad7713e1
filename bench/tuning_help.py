"""Does tuning few weights help? Every named method at several sizes against full tuning, on tasks with real data.

    OMP_NUM_THREADS=4 python bench/family.py recipes/domains.yaml
    OMP_NUM_THREADS=1 python bench/tuning_help.py encoder
    OMP_NUM_THREADS=1 python bench/tuning_help.py grid
    OMP_NUM_THREADS=1 python bench/tuning_help.py domains --search-seeds 2
    OMP_NUM_THREADS=1 python bench/tuning_help.py directions --search-seeds 2
    OMP_NUM_THREADS=1 python bench/tuning_help.py tasks

`grid`: tagging (UD English EWT), classification (CLINC intents), generation (tldr commands), and where they are named
entities (CrossNER), polarity, summaries (SciTLDR) and translation (Tatoeba), from small pretrained models: the decoder
of the domains family, or with `--on encoder` one that `encoder` pretrains by masked LM. The learning rate is searched
for each method at its middle size on the dev split with the first seed (`--search-seeds`: several), and from there on
at its other sizes; that of a fresh head at the best rate of its method, from where the head alone is best: `heads`
shows what that gains. `--head-rate 5e-3`: all heads learn at one rate. `--longer` beside `--steps`: bodies' rates are
searched from those on that are kept of the task's own number of steps. `domains`: AdapterFusion and MAD-X on
named entities of five domains. `directions`: the same between directions of translation. `tasks`: a task alone, with
another one, and after it. Every part goes on where it was cut short, and takes nothing that was trained from another
model; `show` prints the tables of the grid as far as it is there and draws the picture, `keep` puts its trainings into
`tuning_runs`, from where they are taken by who has the same model and trained nothing. A larger run is other flags:
`--steps`, `--train`, `--seeds`, `--limit`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import yaml

import graft
from _help import source_line
from _tuning_directions import Directions
from _tuning_domains import Domains
from _tuning_grid import METHODS, SHARES, Grid, heads
from _tuning_runs import WORK, Task, keep, sample
from _tuning_several import several
from _tuning_table import drawing
from _tuning_tasks import TASKS, entities
from ensembling_help import family

HERE = Path(__file__).resolve().parent


def pretrain_encoder(given: argparse.Namespace) -> list[str]:
    """An encoder by masked LM on the text of the domains family, in BERT's form, whose layers have biases."""
    node = {
        "data": "mixed", "architecture": "encoder", "positions": "learned", "size": "5M", "length": 128,
        "tokenizer": {"path": str(given.family / "models" / "base")}, "budget": given.budget, "batch_size": 8,
        "learning_rate": 1e-3, "evaluate_every": 200, "objective": {"kind": "masked", "share": 0.3},
    }  # fmt: skip
    recipe = {
        "family": "tuning_encoder", "seed": 0, "data": family()[0]["data"],
        "models": {"encoder": {"pretrain": node}}, "evaluate": [],
    }  # fmt: skip
    (WORK / "encoder.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    graft.run(WORK / "encoder.yaml", WORK / "encoder")
    return []


def body(given: argparse.Namespace) -> Path:
    """The model that heads are put on."""
    base = given.family / "models" / "base"
    return WORK / "encoder" / "models" / "encoder" if given.on == "encoder" else base


def base_of(task: Task, given: argparse.Namespace) -> Path:
    """The model that a task starts from."""
    return given.family / "models" / "base" if task.kind == "text" else body(given)


def grids(given: argparse.Namespace) -> list[Grid]:
    """Of the tasks that were asked for."""
    return [Grid(TASKS[name], base_of(TASKS[name], given), given) for name in given.tasks]


def show(given: argparse.Namespace) -> list[str]:
    """The tables of the grids; the picture is drawn into the work folder."""
    found = [grid.show() for grid in grids(given)]
    panels = [panel for _, panel in found if panel is not None]
    if panels:
        (WORK / f"tuning{'-encoder' * (given.on == 'encoder')}.svg").write_text(drawing(panels))
    return [line for lines, _ in found for line in lines]


def fill(given: argparse.Namespace) -> list[str]:
    """The grids, and their tables."""
    for grid in grids(given):
        grid.fill()
    return show(given)


def keep_runs(given: argparse.Namespace) -> list[str]:
    """What the tables were made of, into the checkout: grids and, where they are there, domains."""
    found = [grid.results for grid in grids(given)]
    found += [domains for domains in (Domains(body(given), given).results,) if domains.rows]
    return [f"{keep(results)}: {len(results.rows)} rows" for results in found]


def compare_heads(given: argparse.Namespace) -> list[str]:
    """What a search for the rates of heads gained in the grids that are there."""
    return heads(grids(given))


def directions(given: argparse.Namespace) -> list[str]:
    """AdapterFusion and MAD-X between directions of translation."""
    found = Directions(given.family / "models" / "base", given)
    found.fill()
    return found.show()


def domains(given: argparse.Namespace) -> list[str]:
    """AdapterFusion and MAD-X."""
    found = Domains(body(given), given)
    found.fill()
    return found.show()


def tasks(given: argparse.Namespace) -> list[str]:
    """A task alone, with another one, and after it."""
    counts = {"train": given.train, "dev": max(2, given.limit // 2), "test": given.limit}
    return several(body(given), sample(entities("music"), counts), sample(TASKS["tagging"], counts), given)


PARTS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "encoder": pretrain_encoder, "grid": fill, "heads": compare_heads, "domains": domains, "directions": directions,
    "tasks": tasks, "show": show, "keep": keep_runs,
}  # fmt: skip


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--family", type=Path, default=HERE / "work" / "domains", help="folder of the domains family")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS)[:3], help="of the grid")
    parser.add_argument("--on", choices=["decoder", "encoder"], default="decoder", help="what heads are put on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="of the grid; all, if none is named")
    parser.add_argument("--shares", nargs="+", type=float, choices=SHARES, default=SHARES, help="of the grid")
    parser.add_argument("--steps", type=int, help="of each training; as many as the task has, if it is not said")
    parser.add_argument("--longer", action="store_true", help="search rates from those on that the task's steps found")
    parser.add_argument("--train", type=int, default=2000, help="records to train on, at most")
    parser.add_argument("--limit", type=int, default=200, help="records of test; half as many of dev")
    parser.add_argument("--generate", type=int, default=0, help="commands that are written out, of those")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search-seeds", type=int, default=1, help="of the search for learning rates")
    parser.add_argument("--head-rate", type=float, help="of all fresh heads; each searched, if it is not said")
    parser.add_argument("--budget", default="2M tokens", help="of the encoder's pretraining")
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print("\n".join([*PARTS[given.part](given), source_line()]))


if __name__ == "__main__":
    main()
