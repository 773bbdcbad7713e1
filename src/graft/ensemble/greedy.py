"""Plain greedy decoding: whether a call of `generate` asks for it, and the texts that other ways of it give."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from graft.ensemble.base import Ensemble
    from graft.ensemble.causal import EnsembleForCausalLM


def plain_greedy(
    model: EnsembleForCausalLM, input_ids: torch.Tensor | None, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What is to be decoded, where these options of `generate` say plain greedy decoding."""
    ids = options.get("input_ids") if input_ids is None else input_ids
    known = {"input_ids", "attention_mask", "max_new_tokens", "eos_token_id", "pad_token_id", *_GREEDY}
    other = any(value not in _GREEDY[name] for name, value in options.items() if name in _GREEDY)
    if ids is None or other or not set(options) <= known or options.get("max_new_tokens") is None:
        return None
    own, mask = model.generation_config, options.get("attention_mask")
    said = {name for name, value in own.to_diff_dict().items() if value not in (None, False)}
    if not said <= _UNHEARD or (mask is not None and bool((mask.long().diff(dim=-1) < 0).any())):
        return None
    tokens = {name: options.get(name, getattr(own, name)) for name in ("eos_token_id", "pad_token_id")}
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": options["max_new_tokens"], **tokens}


_GREEDY: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "num_beams": (None, 1),
    "stopping_criteria": (None, []),
    "use_cache": (None, True),
}
"""Options of `generate` with the values that change nothing in greedy decoding."""
_UNHEARD = {"transformers_version", "_from_model_config", "max_length", "use_cache"} | {
    f"{name}_token_id" for name in ("bos", "eos", "pad")
}
"""What a generation configuration may say without changing it."""


def pad_of(model: Ensemble, given: int | None, ends: Collection[int]) -> int:
    """What stands behind an answer that ends before others."""
    return next((each for each in (given, model.config.pad_token_id, *sorted(ends)) if isinstance(each, int)), 0)


def behind(prompts: torch.Tensor, new: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """The prompts as they came and behind them the new tokens, padded to the longest."""
    longest = max(map(len, new))
    rows = [[*each, *[pad] * (longest - len(each))] for each in new]
    return torch.cat([prompts, torch.tensor(rows, dtype=prompts.dtype, device=prompts.device)], 1)
