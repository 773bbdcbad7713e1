"""Run a recipe, take the time, and print its table for RESULTS.md: `python bench/family.py recipes/domains.yaml`."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import graft
from _side_by_side import machine, versions
from graft import report

WORK = Path(__file__).parent / "work"


def main() -> None:
    """Run and print. A run that was cut short goes on: the time is that of this stretch; what was there is named."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("recipe", type=Path)
    recipe = arguments.parse_args().recipe
    out = WORK / recipe.stem
    started = time.perf_counter()
    done = graft.run(recipe, out)
    minutes = (time.perf_counter() - started) / 60
    kept = f" ({', '.join(done.cached)} were there already)" if done.cached else ""
    print(f"### {recipe.stem}\n")
    print("\n".join(table(report.summary(out))))
    print(f"\n`{shlex.join(['python', *sys.argv])}`: {minutes:.1f} minutes{kept}. {machine()}.")
    print(f"{versions(['graft', 'torch', 'transformers'])}; {datetime.date.today().isoformat()}.")


def table(summary: dict[str, Any]) -> list[str]:
    """Markdown lines: a row a model, a column a measure; the best in bold; combinations against their best parent."""
    measured = [model for model in summary["models"] if model["scores"]]
    columns = list(dict.fromkeys(name(score) for model in measured for score in model["scores"]))
    heads = ["model", "made by", *columns, "tokens/s", "peak memory, MB"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for model in measured:
        scores = {name(score): cell(score) for score in model["scores"]}
        cost = [f"{model['cost']['tokens_per_s']:,.0f}", f"{model['cost']['peak_memory_bytes'] / 1e6:,.0f}"]
        cells = [model["name"], model["verb"], *(scores.get(column, "–") for column in columns), *cost]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def name(score: dict[str, Any]) -> str:
    """The heading of a score's column."""
    arrow = "↑" if score["higher_is_better"] else "↓"
    return f"{score['on'] or score['task']}, {score['metric'].replace('_', ' ')} {arrow}"


def cell(score: dict[str, Any]) -> str:
    """Value ± half of the interval, bold where it is the best; for a combination, the difference to its best parent."""
    text = f"**{score['value']:.3f}**" if score["best"] else f"{score['value']:.3f}"
    if score["low"] is not None and score["high"] is not None:
        text += f" ± {(score['high'] - score['low']) / 2:.3f}"
    against = score["against_best_parent"]
    if against is not None:
        p = "" if against["p"] is None else f", p {'< 0.001' if against['p'] < 0.001 else format(against['p'], '.2g')}"
        text += f" ({against['difference']:+.3f} to {against['best_parent']}{p})"
    return text


if __name__ == "__main__":
    main()
