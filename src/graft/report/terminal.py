"""The run as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from graft.report.judge import Verdict, apart, best, decimals, half, verdict, verdicts
from graft.report.quantised import packings
from graft.report.read import Column, Model, Run
from graft.report.words import bytes_text, fixed, rate_text

STYLES = {"▼": "bold red", "▽": "yellow", "▲": "green", "△": "dim green"}
LEGEND = (
    "± longer side of the 95 % interval · bold: best of its column · against the best parent: "
    "▲ better, ▼ worse (paired test, p < 0.05); △ ▽ within chance or not tested"
)


def render(run: Run) -> RenderableType:
    """Tables, legend, every combination that lost to a parent, what packing cost, and what is missing or stale."""
    parts: list[RenderableType] = [_Tables(run)]
    if run.scores:
        parts.append(Text(LEGEND, style="dim"))
    parts.extend(_losses(run))
    parts.extend(Text(each.words) for each in packings(run))
    parts.extend(Text(f"note: {problem}", style="dim") for problem in run.problems)
    return Group(*parts)


@dataclass(frozen=True)
class _Tables:
    """As many tables, one under the other, as the terminal's width asks for: a number is never cut."""

    run: Run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names, made = _names(self.run), _made(self.run)
        pending = [*_score_columns(self.run), *_cost_columns(self.run)]
        first = True
        while pending or first:
            chosen = [names, made] if first else [names]
            room = options.max_width + 2 - sum(c.width for c in chosen)
            while pending and (len(chosen) < 2 or room >= pending[0].width):
                room -= pending[0].width
                chosen.append(pending.pop(0))
            yield _table(chosen, self.run.family if first else None)
            first = False


@dataclass(frozen=True)
class _Column:
    """A heading and a cell for each model."""

    heading: str
    cells: list[Text]
    justify: JustifyMethod = "right"

    @property
    def width(self) -> int:
        """How many columns of the terminal it takes, the gap included."""
        lines = [*self.heading.split("\n"), *(cell.plain for cell in self.cells)]
        return max(cell_len(line) for line in lines) + 3


def _table(columns: Sequence[_Column], title: str | None) -> Table:
    table = Table(
        title=Text(title, style="bold") if title else None, title_justify="left", pad_edge=False, box=box.SIMPLE
    )
    for column in columns:
        table.add_column(Text(column.heading), justify=column.justify, no_wrap=True)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table


def _names(run: Run) -> _Column:
    shown = ((name if len(name) <= 28 else name[:27] + "…", model) for name, model in run.models.items())
    return _Column("model", [Text(name, style="" if _known(run, model) else "dim") for name, model in shown], "left")


def _made(run: Run) -> _Column:
    words = (model.kind if _known(run, model) else f"{model.verb}, not made" for model in run.models.values())
    return _Column("made by", [Text(kind, style="dim") for kind in words], "left")


def _known(run: Run, model: Model) -> bool:
    return model.made or model.name in run.costs


def _score_columns(run: Run) -> Iterator[_Column]:
    for column in run.columns:
        heading = f"{column.place}\n{column.metric_words} {arrow(column)}"
        yield _Column(heading, [_cell(run, name, column) for name in run.models])


def _cost_columns(run: Run) -> Iterator[_Column]:
    written = {
        "tokens/s": ("tokens_per_s", rate_text),
        "peak\nmemory": ("peak_memory_bytes", bytes_text),
        "on disk": ("disk_bytes", bytes_text),
    }
    for heading, (key, write) in written.items():
        yield _Column(heading, [Text(write(run.costs.get(name, {}).get(key))) for name in run.models])


def _losses(run: Run) -> Iterator[Text]:
    """A line for each combination that is worse than its best parent somewhere."""
    lost: dict[str, list[tuple[Column, Verdict]]] = {}
    for column, found in verdicts(run):
        if found.worse:
            lost.setdefault(found.model, []).append((column, found))
    for model, cases in lost.items():
        words = "; ".join(_loss(run, column, found) for column, found in cases)
        sure = any(found.significant for _, found in cases)
        yield Text(f"{model} is worse than its best parent on {words}", style=STYLES["▼" if sure else "▽"])


def _loss(run: Run, column: Column, found: Verdict) -> str:
    own, parent = run.scores[found.model, column]["value"], run.scores[found.parent, column]["value"]
    places = apart(own, parent, decimals(run, column))
    return (
        f"{found.mark} {column.title}: {fixed(own, places)}, {found.parent} {fixed(parent, places)} ({found.evidence})"
    )


def arrow(column: Column) -> str:
    """The direction in which scores of this column get better."""
    return "↑" if column.higher_is_better else "↓"


def _cell(run: Run, name: str, column: Column) -> Text:
    row = run.row(name, column)
    if row is None:
        return Text("–", style="dim")
    places, error, found = decimals(run, column), half(row), verdict(run, name, column)
    cell = Text(fixed(row["value"], places), style="bold" if name in best(run, column) else "")
    if error is not None:
        cell.append(f" ±{fixed(error, places)}", style="dim not bold")
    mark = found.mark if found else ""
    return cell.append(f" {mark or ' '}", style=STYLES.get(mark, ""))
