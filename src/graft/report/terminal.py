"""The run as a table in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graft.report.judge import best, decimals, half, sentence, verdict, verdicts
from graft.report.read import Column, Run
from graft.report.words import bytes_text, rate_text

STYLES = {"▼": "bold red", "▽": "yellow", "▲": "green", "△": "dim green"}
LEGEND = (
    "± half of the 95 % interval · bold: best of its column · against the best parent: "
    "▲ better, ▼ worse (paired test, p < 0.05); △ ▽ within chance or not tested"
)


def render(run: Run) -> RenderableType:
    """Table, legend, every flag in words, and what is missing or stale."""
    parts: list[RenderableType] = [_table(run)]
    if run.scores:
        parts.append(Text(LEGEND, style="dim"))
    for column, found in verdicts(run):
        if found.worse:
            parts.append(Text(f"{found.mark} {sentence(run, column, found)}", style=STYLES[found.mark]))
    parts.extend(Text(f"note: {problem}", style="dim") for problem in run.problems)
    return Group(*parts)


def _table(run: Run) -> Table:
    table = Table(title=Text(run.family, style="bold"), title_justify="left", pad_edge=False, box=box.SIMPLE)
    table.add_column("model", no_wrap=True)
    table.add_column("made by", style="dim", no_wrap=True)
    for column in run.columns:
        table.add_column(Text(f"{column.place}\n{column.metric_words} {arrow(column)}"), justify="right", no_wrap=True)
    for title in ("tokens/s", "peak\nmemory", "on disk"):
        table.add_column(Text(title), justify="right", no_wrap=True)
    for name, model in run.models.items():
        cost = run.costs.get(name, {})
        table.add_row(
            Text(name, style="" if model.made or cost else "dim"),
            Text(model.kind if model.made or cost else f"{model.verb}, not made"),
            *(_cell(run, name, column) for column in run.columns),
            rate_text(cost.get("tokens_per_s")),
            bytes_text(cost.get("peak_memory_bytes")),
            bytes_text(cost.get("disk_bytes")),
        )
    return table


def arrow(column: Column) -> str:
    """The direction in which scores of this column get better."""
    return "↑" if column.higher_is_better else "↓"


def _cell(run: Run, name: str, column: Column) -> Text:
    row = run.row(name, column)
    if row is None:
        return Text("–", style="dim")
    places, error, found = decimals(run, column), half(row), verdict(run, name, column)
    cell = Text(f"{row['value']:.{places}f}", style="bold" if best(run, column) == name else "")
    if error is not None:
        cell.append(f" ±{error:.{places}f}", style="dim not bold")
    mark = found.mark if found else ""
    return cell.append(f" {mark or ' '}", style=STYLES.get(mark, ""))
