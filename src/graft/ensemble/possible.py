"""Whether anything may still be written: a rule rules tokens out, and so do options of `generate`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from graft.errors import RunError
from graft.methods import method


class Possible:
    """Raises RunError where no token is left to a text, with what would leave one."""

    def __init__(self, rule: str):
        self.rule = rule

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores [batch, vocabulary]` as they are."""
        if torch.isneginf(scores.amax(-1)).any():
            wider = getattr(method("graft.ensemble", self.rule), "WIDER", None)
            raise RunError(
                f"{self.rule}: expected a token that may be written, found that options of `generate` (min_new_tokens, "
                "bad_words_ids, suppress_tokens) forbid all that the ensemble leaves possible: "
                f"{f'{wider}, or ' if wider else ''}leave those options out"
            )
        return scores


def watched(rule: str, own: GenerationConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate` with which it is said where nothing can be written, rather than drawn from nothing.

    Beams are left alone: one of which nothing can come is given up for another.
    """
    beams = options.get("num_beams") or (options.get("generation_config") or own).num_beams or 1
    if beams > 1:
        return options
    processors = LogitsProcessorList([*(options.get("logits_processor") or ()), Possible(rule)])
    return {**options, "logits_processor": processors}
