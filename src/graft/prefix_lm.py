"""Prefix language models: decoders that read a prompt with attention both ways and write behind it from left to right
(Raffel et al. 2020, section 3.2.1). Their configuration says so (`prefix_lm: true`).

`transformers` has no such switch for its decoders. Here their own forward is given the mask of training, in the pass
that reads a prompt: `generate` of a loaded model does so by itself, a scorer says where each row's prompt ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

from graft.data.objectives import PREFIX_LM, is_prefix_lm

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def mark(model: PreTrainedModel, prefix: bool) -> None:
    """Note in a model's configuration, in place, whether it is a prefix LM."""
    if prefix:
        setattr(model.config, PREFIX_LM, True)
    elif is_prefix_lm(model.config):
        delattr(model.config, PREFIX_LM)


def prefix_lms(model: Any) -> list[Any]:
    """The prefix LMs in a model: itself, or members of an ensemble."""
    from transformers import GenerationMixin

    return [
        module for module in model.modules()
        if isinstance(module, GenerationMixin) and is_prefix_lm(getattr(module, "config", None))
    ]  # fmt: skip


@contextmanager
def read_both_ways(model: Any, prompts: int | torch.Tensor) -> Iterator[None]:
    """Meanwhile prefix LMs in `model` that read a row from its beginning see the whole prompt from all of its tokens.

    `prompts`: how many tokens of a row, padding on its left counted in, are prompt; of each row where it is `[rows]`.
    Passes behind a cache are left as they are. Raises ValueError for a mask of a kind that cannot be widened.
    """
    hooks = [one.register_forward_pre_hook(partial(_widen, prompts), with_kwargs=True) for one in prefix_lms(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def write_as_trained(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself; where it is or holds a prefix LM, its `generate` reads prompts both ways from now on.

    `prompt_tokens` then says how many tokens of a row are prompt, padding counted in; None: all that are given.
    """
    if prefix_lms(model):
        model.generate = MethodType(_generate, model)  # type: ignore[assignment]
    return model


def _generate(model: Any, inputs: Any = None, *, prompt_tokens: int | None = None, **options: Any) -> Any:
    given = next((t for t in (inputs, options.get("input_ids"), options.get("inputs_embeds")) if t is not None), None)
    if prompt_tokens is None:
        prompt_tokens = 0 if given is None else given.shape[1]
    with read_both_ways(model, prompt_tokens):
        return type(model).generate(model, inputs, **options)


def _widen(prompts: int | torch.Tensor, module: Any, args: Any, given: dict[str, Any]) -> Any:
    """A forward's arguments with the mask of a prefix LM; None, which leaves them, behind a cache."""
    import torch

    read = next(t for t in (*args[:1], given.get("input_ids"), given.get("inputs_embeds")) if t is not None)
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        return None
    rows, length = read.shape[:2]
    ends = torch.as_tensor(prompts, device=read.device).expand(rows)
    inside = torch.arange(length, device=read.device) < ends[:, None]
    return args, {**given, "attention_mask": _widened(given.get("attention_mask"), inside, module)}


def _widened(mask: torch.Tensor | None, inside: torch.Tensor, module: Any) -> torch.Tensor:
    """`mask`, in which the tokens `inside [rows, length]` see each other too; it may be none, one of padding
    `[rows, length]`, or whole `[rows, 1, length, keys]`."""
    import torch

    from graft.masks import attention_mask

    rows, length = inside.shape
    if mask is None or mask.dim() == 2:
        real = torch.ones_like(inside) if mask is None else mask[:, :length].bool().to(inside.device)
        adds = getattr(module.config, "_attn_implementation", "eager") != "sdpa"
        additive = next(module.parameters()).dtype if adds else None
        return attention_mask(torch.where(real, 0, -1), causal=True, prefix=inside & real, additive=additive)
    if mask.dim() != 4:
        raise ValueError(f"expected a mask of padding or of {length} tokens, found one of shape {tuple(mask.shape)}")
    both = torch.zeros(rows, 1, length, mask.shape[-1], dtype=torch.bool, device=mask.device)
    both[..., :length] = (inside[:, :, None] & inside[:, None, :])[:, None].to(mask.device)
    return mask | both if mask.dtype == torch.bool else mask.masked_fill(both, 0)
