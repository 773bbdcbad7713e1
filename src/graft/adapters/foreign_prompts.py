"""Prompts that peft's own modules make (p-tuning, prefixes behind a projection, …), put in front by graft.

peft's encoder makes embeddings of learned tokens, or keys and values; they join as those of graft's own prompt and
prefix tuning do, so that packed rows, the cache, beams and gradient checkpointing work. What is saved is what the
encoder made, as peft saves it: an adapter of graft's own kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.adapters.keys import KeySite, TokenFront, TokenSite
from graft.adapters.point import Point
from graft.adapters.stack import Adapters, adopt
from graft.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


KEYED = ("PREFIX_TUNING", "CARTRIDGE")
"""Types that learn keys and values; the others learn tokens."""


class Encoded(nn.Module):
    """What an encoder of peft's makes of its learned tokens: `[tokens, channels]`."""

    def __init__(self, encoder: nn.Module, tokens: torch.Tensor):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("tokens", tokens, persistent=False)

    def forward(self) -> torch.Tensor:
        """For one row; a prompt for several tasks gives that of the first."""
        tokens: Any = self.tokens
        several = "task_ids" in inspect.signature(type(self.encoder).forward).parameters
        first = {"task_ids": torch.zeros(1, dtype=torch.long, device=tokens.device)} if several else {}
        return self.encoder(tokens[None], **first)[0]

    @torch.no_grad()
    def settled(self) -> torch.Tensor:
        """What it gives once training is over."""
        training = self.training
        made = self.eval()()
        self.train(training)
        return made


class MadeTokens(TokenSite):
    """Learned tokens whose embeddings an encoder makes."""

    def __init__(self, point: Point, made: Encoded):
        nn.Module.__init__(self)
        self.point, self.made, self.gates = point, made, nn.ParameterList()
        self.read: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def embeddings(self) -> torch.Tensor:  # type: ignore[override]
        """`[tokens, channels]`."""
        return self.made()

    def settled(self) -> dict[str, torch.Tensor]:
        """The weights of the plain site that does the same."""
        return {"embeddings": self.made.settled()}


class MadeKeys(KeySite):
    """Learned keys and values of one attention module, the one at `place`, which an encoder makes for all of them."""

    def __init__(self, point: Point, made: Encoded, place: int, heads: int, size: int):
        nn.Module.__init__(self)
        self.point, self.made, self.place, self.shape = point, made, place, (heads, size)

    def given(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Those of this module `[heads, tokens, size]`."""
        return *self._cut(self.made()), None

    def _cut(self, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layers = whole.view(len(whole), -1, *self.shape).permute(1, 2, 0, 3)
        return layers[2 * self.place], layers[2 * self.place + 1]

    def settled(self) -> dict[str, torch.Tensor]:
        """The weights of the plain site that does the same."""
        keys, values = self._cut(self.made.settled())
        return {"keys": keys, "values": values}


def put_prompts(model: PreTrainedModel, config: Any, base: Path | None, name: str) -> PreTrainedModel:
    """Put a fresh adapter called `name` into `model` (in place) whose prompts peft makes, and freeze everything else.

    `config`: peft's, of a type that learns prompts. Raises RequestError for a model that is no decoder.
    """
    from peft import get_peft_model

    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if model.config.is_encoder_decoder or "MaskedLM" in type(model).__name__:
        raise RequestError(
            f"peft: prompts of the type {kind} stand in front of decoders, found {type(model).__name__}: use the "
            "method prefix or prompt"
        )
    config.task_type = "CAUSAL_LM"
    training = model.training
    wrapper = get_peft_model(model, config)
    tokens = wrapper.prompt_tokens[wrapper.active_adapter][: config.num_virtual_tokens]
    made = Encoded(wrapper.prompt_encoder[wrapper.active_adapter], tokens).to(model.device)
    with torch.no_grad():
        count, channels = made().shape
    if kind not in KEYED:
        _check_width(model, channels)
        point = Point(form="tokens", on=["input"], size=count, gate=False)
        stack = adopt(model, [point], name, base=base)
        _made_tokens(stack, name, MadeTokens(point, made))
    else:
        point = Point(form="softmax", on=["attention"], size=count, gate=False, shift=True)
        stack = adopt(model, [point], name, base=base)
        _made_keys(stack, name, point, made, channels)
    stack.train_only(model, name)
    return model.train(training)


def _check_width(model: PreTrainedModel, channels: int) -> None:
    """Raises RequestError where learned tokens are of another width than those of the vocabulary."""
    embedding: Any = model.get_input_embeddings()
    width = embedding.weight.shape[-1]
    if channels != width:
        raise RequestError(
            f"peft: expected learned tokens of {width} channels, as the embeddings have, found {channels}: leave "
            "`token_dim` out; where the model widens its embeddings use the method prefix or prompt"
        )


def _made_tokens(stack: Adapters, name: str, site: MadeTokens) -> None:
    stack.sites[name]["input"] = site
    for slot in stack.slots.values():
        for front in slot.fronts.get(name, ()):
            assert isinstance(front, TokenFront)
            front.site = site


def _made_keys(stack: Adapters, name: str, point: Point, made: Encoded, channels: int) -> None:
    plain: Mapping[str, Any] = dict(stack.sites[name].items())
    heads, _, size = next(iter(plain.values())).keys.shape
    if channels != 2 * len(plain) * heads * size:
        raise RequestError(
            f"peft: expected keys and values of {2 * len(plain) * heads * size} numbers a token for this model, found "
            f"{channels}: leave `token_dim`, `num_layers` and `num_attention_heads` out"
        )
    fresh = {id(site): MadeKeys(point, made, place, heads, size) for place, site in enumerate(plain.values())}
    for path, site in plain.items():
        stack.sites[name][path] = fresh[id(site)]
    for slot in stack.slots.values():
        if name in slot.fronts:
            slot.fronts[name] = [fresh[id(front)] for front in slot.fronts[name]]
