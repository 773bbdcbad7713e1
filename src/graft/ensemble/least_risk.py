"""Minimum Bayes risk: of all that the members write, the answer with the highest expected gain against the others.

Each member's answers stand for what it believes, members counted by their weights, so that the references are drawn
from the mixture of the members over whole texts (Kumar and Byrne 2004; Eikema and Aziz 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from graft.ensemble import voting
from graft.ensemble.linear import problem
from graft.ensemble.settings import OutputSettings

__all__ = ["Settings", "choose", "default", "gain_of", "problem"]


class Settings(OutputSettings):
    """What the members write, and by what an answer gains."""

    utility: Annotated[
        Literal["chrf", "bleu", "token_f1", "exact_match"],
        Field(description="What an answer gains where another is the right one."),
    ] = "chrf"
    draw: Annotated[
        Literal["samples", "beams"], Field(description="Whether the answers are sampled or a search's best.")
    ] = "samples"
    candidates: Annotated[int, Field(gt=0, description="Answers that each member writes.")] = 8


def default(members: int, options: Settings) -> list[float]:
    """Equal weights."""
    return [1 / members] * members


def choose(outputs: Sequence[Sequence[str]], weights: Sequence[float], options: Settings) -> int:
    """Which answer is given: its place in all `outputs` (each member's answers) one behind the other."""
    texts, counts = voting.flat(outputs, weights)
    distinct = list(dict.fromkeys(texts))
    found = voting.least_risk(distinct, gain_of(options.utility), counts, references=texts)
    return texts.index(distinct[found])


def gain_of(utility: str) -> Callable[[str, str], float]:
    """`gain(candidate, reference)`, from 0 to 1 or to 100: sentence chrF (Popović 2015), sentence BLEU with smoothing
    (Papineni et al. 2002), F1 of words, or equality."""
    if utility in ("token_f1", "exact_match"):
        from graft.evaluate import metrics

        own = metrics.token_f1 if utility == "token_f1" else metrics.exact_match
        return lambda candidate, reference: own(candidate, [reference])
    from sacrebleu.metrics import BLEU, CHRF

    metric = CHRF() if utility == "chrf" else BLEU(effective_order=True)
    return lambda candidate, reference: metric.sentence_score(candidate, [reference]).score
