"""One colour for each verb, everywhere. The values stand in report.css, for light and for dark."""

from __future__ import annotations

VERBS = ("load", "pretrain", "tune", "align", "merge", "ensemble", "distill", "moe", "pipeline")


def verb_class(verb: str) -> str:
    """The CSS class that sets the colour of a verb; a verb of another package has the neutral one."""
    return f"v-{verb}" if verb in VERBS else "v-other"
