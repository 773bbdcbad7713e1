"""Advice for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.advise.advice import Advice, percent
from graft.advise.candidates import Candidate
from graft.machine import size

if TYPE_CHECKING:
    from rich.table import Table


def words(advice: Advice) -> list[str]:
    """The advice in lines."""
    options = ", ".join(f"{name}: {value}" for name, value in advice.options.items())
    lines = [f"try first: {advice.method}{f' ({options})' if options else ''}, for {advice.task}"]
    return [*lines, *(f"  because {reason}" for reason in advice.why), f"  how sure: {advice.strength}"]


def table(advice: Advice) -> Table:
    """A row a method: what it trains and needs, how it stood to full tuning in the evidence, what is in the way."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("method")
    for head in ("trained", "memory", "of full tuning"):
        made.add_column(head, justify="right")
    made.add_column("changes that make it fit, or what is in the way", overflow="fold")
    for candidate in advice.candidates:
        made.add_row(*_row(candidate, advice))
    return made


def _row(candidate: Candidate, advice: Advice) -> tuple[str, ...]:
    stood = advice.standings.get(candidate.method)
    kept = "100 %" if candidate.method == "full" else "?"
    if stood is not None:
        kept = f"{100 * stood.kept:.1f} %{' (other sizes)' if stood.far else ''}"
    changes = [f"{name}: {str(value).lower()}" for name, value in candidate.changes.items()]
    changes += ["base in 4 bits"] if candidate.packed and not candidate.why_not else []
    trained = f"{candidate.trained:,} ({percent(candidate.share)} %)" if candidate.trained else ""
    memory = size(candidate.memory_bytes) if candidate.memory_bytes else ""
    return candidate.method, trained, memory, kept, candidate.why_not or ", ".join(changes)
