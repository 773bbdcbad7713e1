"""Whether anything may still be written: a rule rules tokens out, and so do options of `generate`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

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


class Watched(GenerationMixin):
    """Generation in which it is said where nothing can be written, rather than that it is drawn from nothing.

    Where no processor forbids anything nobody need look: a rule leaves a token, or says that it does not. Beams are
    left alone: one of which nothing can come is given up for another.
    """

    config: Any

    def _get_logits_processor(self: Any, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]
        if len(found) and (generation_config.num_beams or 1) == 1:
            found.append(Possible(self.config.combine))
        return found
