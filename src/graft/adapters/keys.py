"""Learned keys and values in front of those of attention: prefix tuning and prompt tuning, one mechanism for both.

A query sees the learned keys beside the text's own. That is the gated form of He et al. (2022, equation 5):

    h' = (1 - λ(x)) · h + λ(x) · softmax(q Pkᵀ) Pv,   λ(x) = Σ exp(q Pkᵀ) / (Σ exp(q Pkᵀ) + Σ exp(q Kᵀ))

The keys join where attention is computed, behind any cache: nothing is written into it, padding, packing, beams and
gradient checkpointing need no care. A learned gate g for each head, zero at first, makes h + g·(h' - h) of it, so that
it starts as the identity; without it h' is as published.

The keys and values of learned tokens are what the frozen model makes of them, read by themselves in front of the text;
in a decoder that is prompt tuning exactly, since tokens there never see what follows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from graft.adapters.forms import closed_gate
from graft.adapters.naming import CROSS
from graft.adapters.places import Layout, call_briefly
from graft.adapters.point import Point, chosen
from graft.adapters.positions import first_in, tables_of
from graft.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.adapters.stack import Adapters

IMPLEMENTATION = "graft"
"""The name under which attention with learned keys is known to `transformers`."""

SLOT = "graft_keys"
"""The attribute of an attention module that holds what is in front of its keys."""


class Front(Protocol):
    """What stands in front of one attention module's keys."""

    def given(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys `[key heads, n, size]`, values `[key heads, n, size]`, gates `[heads]` or None."""


@dataclass(frozen=True)
class Shapes:
    """Of one attention module: heads, heads of keys, sizes of a key and of a value."""

    heads: int
    key_heads: int
    key_size: int
    value_size: int


class KeySite(nn.Module):
    """Learned keys and values of one attention module: prefix tuning (Li & Liang 2021)."""

    def __init__(self, point: Point, shapes: Shapes):
        super().__init__()
        self.point = point
        count = point.size or 1
        self.keys = nn.Parameter(torch.randn(shapes.key_heads, count, shapes.key_size) * shapes.key_size**-0.5)
        self.values = nn.Parameter(torch.randn(shapes.key_heads, count, shapes.value_size) * shapes.value_size**-0.5)
        self.gate = closed_gate(point, shapes.heads) if point.gate else None

    def given(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Its own."""
        return self.keys, self.values, self.gate


class TokenSite(nn.Module):
    """Learned embeddings `[tokens, channels]` in front of the text: prompt tuning (Lester et al. 2021).

    They start as those of tokens of the vocabulary, drawn at random. `gates`: one for each head of each attention.
    """

    def __init__(self, point: Point, model: PreTrainedModel, shapes: Sequence[Shapes]):
        super().__init__()
        self.point = point
        embedding: Any = model.get_input_embeddings()
        table = embedding.weight
        rows = torch.randint(len(table), (point.size or 1,), device="cpu").to(table.device)
        self.embeddings = nn.Parameter(table.detach()[rows].float().clone())
        gates = [closed_gate(point, shape.heads) for shape in shapes] if point.gate else []
        self.gates = nn.ParameterList(gates)
        self.read: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Keys and values of each attention module, made anew for every call of the model."""


@dataclass
class TokenFront:
    """A token site as one attention module, the one at `place`, sees it."""

    site: TokenSite
    place: int

    def given(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the frozen model made of the tokens in this module."""
        if not self.site.read:
            raise RequestError("learned tokens are read when the whole model is called: call it, not a part of it")
        keys, values = self.site.read[self.place]
        return keys, values, self.site.gates[self.place] if len(self.site.gates) else None


@dataclass
class Keys:
    """All that stands in front of one attention module's keys."""

    stack: Adapters
    fronts: dict[str, list[Front]] = field(default_factory=dict)
    seen: tuple[torch.Tensor, torch.Tensor] | None = None
    """Keys and values of the last call, while tokens are read."""
    watching: bool = False

    def attend(self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, how: Any) -> Any:
        """Attention `[batch, length, heads, size]` with what is active."""
        if self.watching:
            self.seen = k, v
        rows = self.stack.rows
        if rows is not None:
            return self._by_rows(module, q, k, v, mask, how, rows)
        active = [(front, w) for name, w in self.stack.active for front in self.fronts.get(name, ())]
        if not active or self.watching:
            return sdpa_attention_forward(module, q, k, v, mask, **how)[0]
        return joined(module, (q, k, v, mask), how, active)

    def _by_rows(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, how: Any,
        names: Sequence[str | None],
    ) -> torch.Tensor:  # fmt: skip
        out = sdpa_attention_forward(module, q, k, v, mask, **how)[0]
        for name in dict.fromkeys(names):
            fronts = self.fronts.get(name, []) if name is not None else []
            if fronts:
                rows = self.stack.rows_of(name, len(q)).to(q.device)
                inputs = q[rows], k[rows], v[rows], mask if mask is None or len(mask) == 1 else mask[rows]
                out = out.index_copy(0, rows, joined(module, inputs, how, [(front, 1.0) for front in fronts]))
        return out


def joined(module: Any, inputs: Any, how: Any, active: Sequence[tuple[Front, float]]) -> torch.Tensor:
    """h + Σ weight · g · (h' - h), h being attention over the text's own keys and h' that with the learned ones."""
    if len(active) == 1 and active[0][1] == 1.0 and active[0][0].given()[2] is None:
        return _with(module, inputs, how, active[0][0])
    plain = sdpa_attention_forward(module, *inputs, **how)[0]
    out = plain
    for front, weight in active:
        gate = front.given()[2]
        change = _with(module, inputs, how, front) - plain
        out = out + weight * (change if gate is None else gate[:, None].to(change.dtype) * change)
    return out


def _with(module: Any, inputs: Any, how: dict[str, Any], front: Front) -> torch.Tensor:
    """Attention over the learned keys and the text's own."""
    q, k, v, mask = inputs
    keys, values, _ = front.given()
    count, batch = keys.shape[-2], len(q)
    how = dict(how)
    causal = how.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and causal and q.shape[2] > 1:
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        free = torch.ones_like if mask.dtype == torch.bool else torch.zeros_like
        mask = torch.cat([free(mask[..., :1]).expand(*mask.shape[:-1], count), mask], -1)
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    if how.get("position_bias") is not None:
        bias = how["position_bias"]
        how["position_bias"] = torch.cat([bias.new_zeros(*bias.shape[:-1], count), bias], -1)
    k = torch.cat([keys.to(k.dtype).expand(batch, -1, -1, -1), k], 2)
    v = torch.cat([values.to(v.dtype).expand(batch, -1, -1, -1), v], 2)
    return sdpa_attention_forward(module, q, k, v, mask, is_causal=False, **how)[0]


def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **how: Any) -> tuple[Any, None]:
    """Attention of any module of `transformers`, with learned keys where it has some in front."""
    keys = module.__dict__.get(SLOT)
    if keys is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)[0], None
    return keys.attend(module, query, key, value, attention_mask, how), None


def mask_of(*args: Any, **how: Any) -> torch.Tensor | None:
    """The mask of sdpa attention; a skeleton's padding cannot be looked at, so that its mask is never left out."""
    padding = how.get("attention_mask")
    if padding is not None and padding.device.type == "meta":
        how |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **how)


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, mask_of)


class _Probe:
    """Stands in every module's slot for one call and notes which of them compute attention, on what shapes."""

    def __init__(self) -> None:
        self.found: dict[int, Shapes] = {}

    def attend(self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, how: Any) -> Any:
        self.found[id(module)] = Shapes(q.shape[1], k.shape[1], k.shape[-1], v.shape[-1])
        return sdpa_attention_forward(module, q, k, v, mask, **how)[0]


def attention_modules(model: PreTrainedModel, *, moving: bool = False) -> dict[str, Shapes]:
    """The modules that compute attention through the interface of `transformers`, by trying, in the model's order.

    `moving`: whether tokens are to be read apart, or the text's positions to be moved. Raises RequestError where the
    model has no such modules, one that is not scaled dot-product attention, or where it cannot be moved.
    """
    name = type(model).__name__
    own = (
        f"{name}: expected attention through the interface of transformers (sdpa), which learned keys join; this "
        "model computes its own: use lora, ia3 or an adapter"
    )
    if not getattr(model, "_supports_sdpa", False):
        raise RequestError(own)
    if model.config._attn_implementation not in ("sdpa", IMPLEMENTATION):
        raise RequestError(
            f"{name}: learned keys join sdpa attention, found {model.config._attn_implementation}: load it with "
            "sdpa, or use lora, ia3 or an adapter"
        )
    model.set_attn_implementation(IMPLEMENTATION)
    probe = _Probe()
    held = {module: module.__dict__.get(SLOT) for module in model.modules()}
    try:
        for module in held:
            module.__dict__[SLOT] = probe
        given = call_briefly(model)
    finally:
        for module, before in held.items():
            if before is None:
                del module.__dict__[SLOT]
            else:
                module.__dict__[SLOT] = before
    found = {path: probe.found[id(module)] for path, module in model.named_modules() if id(module) in probe.found}
    if not found:
        raise RequestError(own)
    if moving and getattr(model, "_is_stateful", False) and not hasattr(given, "past_key_values"):
        raise RequestError(
            f"{name}: keeps what it has read in its own modules, which learned tokens, or keys that take positions, "
            "would change: use a prefix with a gate, lora, ia3 or an adapter"
        )
    return found


def wanted(found: dict[str, Shapes], layout: Layout, point: Point) -> dict[str, Shapes]:
    """Those of the attention modules that a point names. Raises RequestError where there are none."""
    kept = {}
    for path, shapes in found.items():
        stack = next((stack for stack in layout.stacks if path.startswith(f"{stack}.")), None)
        kind = "cross_attention" if CROSS.search(path[len(stack or "") :]) else "attention"
        number = int(path[len(stack) + 1 :].split(".")[0]) if stack else 0
        count = layout.stacks[stack] if stack else 1
        if (kind in point.on or point.on == ["input"]) and number in chosen(point.layers, count):
            kept[path] = shapes
    if not kept:
        name, places = type(layout.model).__name__, ", ".join(found)
        raise RequestError(f"{name}: expected attention at {', '.join(point.on)}, found it at {places}")
    return kept


class Reader:
    """Before every call of the model: reads learned tokens, and moves the text behind what takes up positions."""

    def __init__(self, stack: Adapters, model: PreTrainedModel):
        self.stack, self.model, self.reading, self.inside = stack, model, False, False
        self.translates = model.config.is_encoder_decoder
        self.body: Any = model.get_encoder() if self.translates else model.base_model
        # generation calls the encoder of a translator by itself, heads for tasks call the body; some models call parts
        # of their body only
        called = [self.body] if self.translates or self.body is model else [model, self.body]
        self.handles = [one.register_forward_pre_hook(self.before, with_kwargs=True) for one in called]
        self.handles += [one.register_forward_hook(self.behind, always_call=True) for one in called[:1]]

    def behind(self, module: nn.Module, args: Any, output: Any) -> None:
        """The call that began first is over."""
        self.inside = False

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Read the active tokens; shift the positions of the text."""
        if self.reading or self.inside:
            return args, kwargs
        self.inside = module is self.model
        for name in self.stack.running():
            for site in self.stack.tokens(name):
                self.read(name, site)
        shift = self._shift(args, kwargs)
        if shift is None or self.translates or "position_ids" not in inspect.signature(type(module).forward).parameters:
            return args, kwargs
        positions = kwargs.get("position_ids")
        return args, {**kwargs, "position_ids": (self._own(args, kwargs) if positions is None else positions) + shift}

    def _own(self, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """Positions that the model would give the text by itself."""
        source, cache = _source(args, kwargs), kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        table = next(iter(tables_of(self.model)), None)
        padding = None if table is None else table.padding_idx
        if padding is None or source.is_floating_point():
            first = 0 if table is None else first_in(table)
            return (torch.arange(source.shape[1], device=source.device) + past + first)[None]
        there = (source != padding).long()
        return (there.cumsum(1) + past) * there + padding

    def _shift(self, args: Any, kwargs: dict[str, Any]) -> torch.Tensor | int | None:
        """Positions that are taken, for all rows or for each; None where nothing is."""
        if self.stack.rows is None:
            taken = sum(self.stack.positions(name) for name, _ in self.stack.active)
            return taken or None
        each = [self.stack.positions(name) if name else 0 for name in self.stack.rows]
        source = _source(args, kwargs)
        times = len(source) // len(each)
        shift = torch.tensor(each, device=source.device).repeat_interleave(times)[:, None]
        return shift if any(each) else None

    @torch.no_grad()
    def check(self, name: str, site: TokenSite) -> None:
        """Raises RequestError where the model cannot read embeddings that are no token's; a skeleton is not asked."""
        if self.model.device.type == "meta":
            return
        try:
            self.read(name, site)
        except RuntimeError as error:
            raise RequestError(
                f"{type(self.model).__name__}: expected a model that reads embeddings alone, as learned tokens are, "
                f"found that it does not ({str(error).partition('.')[0]}): use prefix, lora, ia3 or an adapter"
            ) from None

    def read(self, name: str, site: TokenSite) -> None:
        """Run the frozen model on the tokens alone and keep the keys and values of every attention module."""
        body, slots = self.body, self.stack.slots_of(site)
        held = [(m, m.gradient_checkpointing) for m in body.modules() if hasattr(m, "gradient_checkpointing")]
        rows, self.stack.rows = self.stack.rows, None
        active, self.stack.active = self.stack.active, [(name, 1.0)] if rows is not None else self.stack.active
        self.reading = True
        try:
            for slot in slots:
                slot.watching = True
            for m, _ in held:
                m.gradient_checkpointing = False
            extra = {"use_cache": False} if "use_cache" in inspect.signature(type(body).forward).parameters else {}
            # a copy: some models multiply what they read in place
            body(inputs_embeds=site.embeddings[None].to(self.model.dtype, copy=True), **extra)
            site.read = [(k[0], v[0]) for k, v in (slot.seen for slot in slots if slot.seen is not None)]
        finally:
            self.stack.rows, self.stack.active, self.reading = rows, active, False
            for slot in slots:
                slot.watching, slot.seen = False, None
            for m, before in held:
                m.gradient_checkpointing = before


def _source(args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """What the model reads: ids or embeddings."""
    ids = args[0] if args else kwargs.get("input_ids")
    return ids if ids is not None else kwargs["inputs_embeds"]
