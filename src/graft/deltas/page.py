"""The findings as tables for the terminal and as one page of pictures that opens offline."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

from graft.deltas.advice import Advice
from graft.deltas.measure import Deltas
from graft.deltas.outcome import Outcome
from graft.report.series import plot
from graft.report.vectors import pictures

if TYPE_CHECKING:
    from rich.table import Table

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#1d2125}"
    "h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse}td,th{padding:.15em .9em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.quiet{fill:#5d656e}text{font-size:12px}.grid{stroke:#e4e6e6}"
    "svg{max-width:100%;height:auto}"
)


def tables(found: Deltas, advice: Advice, seen: Outcome | None) -> Iterator[Table | str]:
    """What people read in the terminal."""
    from rich.table import Table

    moved = Table("model", "‖δ‖/‖θ₀‖", "largest fifth holds", *found.models, title="task vectors, and their cosines")
    for index, name in enumerate(found.models):
        cosines = ["–" if value is None else f"{value:.3f}" for value in found.whole.cosines[index]]
        moved.add_row(name, f"{found.whole.relative[index]:.4f}", f"{found.largest[index]:.0%}", *cosines)
    yield moved
    if found.whole.conflicts is not None:
        yield (
            f"signs contradict in {found.whole.conflicts:.0%} of the elements that two models or more changed "
            f"(independent changes of all elements: {found.by_chance:.0%})"
        )
    if seen is not None:
        scores = Table("model", seen.metric, title="on held-out data")
        for name, value in seen.scores.items():
            scores.add_row(name, "–" if value is None else f"{value:.4f}")
        yield scores
        for name, found_line in seen.lines.items():
            height = "not a number on the way" if found_line.barrier is None else f"{found_line.barrier:.4f}"
            yield f"barrier on the line {name}: {height}"
    options = "".join(f" --{key} {value}" for key, value in advice.settings.items())
    yield f"try first: {advice.method}{options}"
    yield from (f"  because {reason}" for reason in advice.why)
    if advice.also:
        yield f"  then: {', '.join(advice.also)}"


def page(found: Deltas, advice: Advice, seen: Outcome | None) -> str:
    """One HTML page without scripts."""
    body = [f"<h1>What {html.escape(', '.join(found.models))} learned away from {html.escape(found.base)}</h1>"]
    options = ", ".join(f"{key}: {value}" for key, value in advice.settings.items())
    body += [f"<p><b>Try first: {html.escape(advice.method)}</b> {html.escape(options)}</p><ul>"]
    body += [f"<li>{html.escape(reason)}</li>" for reason in advice.why] + ["</ul>"]
    body += [f"<p>Then: {html.escape(', '.join(advice.also))}</p>"] if advice.also else []
    for words, drawn in pictures(found):
        body += [f"<h2>{html.escape(words)}</h2>", drawn]
    if seen is not None:
        body += _outcome(seen)
    inside = "".join(body)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Task vectors</title><style>{STYLE}</style>'
        f"{inside}</html>\n"
    )


def _outcome(seen: Outcome) -> list[str]:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{'–' if value is None else f'{value:.4f}'}</td></tr>"
        for name, value in seen.scores.items()
    )
    better = "higher" if seen.higher_is_better else "lower"
    found = [
        "<h2>On held-out data</h2>",
        f"<table><tr><th>model</th><th>{html.escape(seen.metric)} ({better} is better)</th></tr>{rows}</table>",
    ]
    lines = {
        f"{name} ({'–' if each.barrier is None else f'{each.barrier:.3f}'})": [
            (share, value) for share, value in zip(each.shares, each.values, strict=True) if value is not None
        ]
        for name, each in seen.lines.items()
    }
    if any(lines.values()):
        found += ["<h2>Along the straight lines between them (and the height of the barrier)</h2>"]
        found += [plot(lines, f"{seen.metric} along the line", across="share of the second model")]
    return found
