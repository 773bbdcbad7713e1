"""What making an ensemble over bytes does beside what making any does. Light."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.ensemble.settings import CoverSettings, EnsembleSettings, FittedWeights
from graft.ensemble.sources import Source
from graft.methods import method


def problems(settings: EnsembleSettings) -> list[str]:
    """What is wrong with what the settings say of bytes, a sentence each."""
    if settings.vocabulary != "bytes":
        return [] if settings.cover is None else ["`cover` is for `vocabulary: bytes`: leave it out, or say that"]
    found = []
    if hasattr(method("graft.ensemble", settings.rule), "choose"):
        found.append(f"bytes are for rules that combine probabilities, found {settings.rule!r}")
    if settings.draft is not None:
        found.append("speculation is for members of one vocabulary, found bytes: leave the draft out")
    gate = settings.weights.gate if isinstance(settings.weights, FittedWeights) else None
    if gate is not None and gate.hidden_states:
        found.append(
            "a gate sees hidden states of members of one vocabulary, found bytes, at which a member follows several "
            "token sequences and so has no single state: leave `hidden_states` out; it sees entropies"
        )
    return found


def configuration(
    settings: EnsembleSettings,
    sources: Sequence[Source],
    entries: list[dict[str, Any]],
    weights: list[float],
    out: Path,
    gate: Any = None,
) -> Any:
    """The ensemble's configuration, with its tokenizer written into `out`; `gate`: its weights, where they follow the
    context.

    Raises CannotCombine for a member whose tokens have no bytes of their own.
    """
    from graft import models
    from graft.ensemble.byte_level.configuration import ByteEnsembleConfig
    from graft.ensemble.byte_level.spelling import spelling_of
    from graft.ensemble.byte_level.tokenizer import byte_tokenizer
    from graft.ensemble.members import home_of

    for name, folder in {source.model: source.folder for source in sources}.items():
        spelling_of(models.load_tokenizer(home_of(folder)), name=name)
    byte_tokenizer().save_pretrained(out)
    cover = (settings.cover or CoverSettings()).plain()
    return ByteEnsembleConfig(entries, settings.rule, weights, settings.options, gate, cover=cover)
