"""X-LoRA (Buehler & Buehler 2024, arXiv:2402.07148): LoRA adapters, the experts, mixed anew for each token and layer.

Every text is read twice. First by the frozen model, and a classifier makes scalings λ of its last hidden states; then
with the experts: h + g · Σₙ λₙ sₙ · upₙ downₙ x. Each reading has a cache of its own, so that a text can go on.

Legend: rows b, tokens t, places p (linear layers with experts; 1 where all have the same scalings), experts n.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from graft.adapters.forms import LowRank
from graft.adapters.junction import Junction
from graft.adapters.places import call_briefly, width_of
from graft.adapters.point import Mixture, Point
from graft.adapters.second_cache import pair, second_of
from graft.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.adapters.stack import Adapters

KEPT = ("past_key_values", "cache_params", "state", "mems")
"""What models call what they keep of a text."""

ASKED = ("output_hidden_states", "output_attentions", "return_dict")
"""What a call may ask for and the first reading need not give."""


class Mixer(nn.Module):
    """The classifier and what it last said: `scalings [b, t, p, n]`, None where no text is being read.

    `layers`: linear ones with ReLU and dropout between them, numbered as peft numbers them.
    """

    def __init__(self, point: Point, channels: int, places: int):
        super().__init__()
        how = self.how = point.mixture or Mixture()
        self.point, self.experts = point, len(point.of)
        if how.top_k is not None and how.top_k > self.experts:
            raise RequestError(f"expected a `top_k` of at most {self.experts}, the experts' number, found {how.top_k}")
        self.channels, self.places = channels, places if how.layerwise else 1
        inner: list[nn.Module] = []
        for inputs, outputs in pairwise([channels, *[how.width] * (how.depth - 1)]):
            inner += [nn.Linear(inputs, outputs), nn.ReLU(), *([nn.Dropout(how.dropout)] if how.dropout else [])]
        last = how.width if how.depth > 1 else channels
        self.layers = nn.Sequential(*inner, nn.Linear(last, self.experts * self.places))
        self.scalings: torch.Tensor | None = None
        self.silent = False
        """Whether experts say nothing in this reading."""

    def first(self) -> None:
        """A text is read for the classifier: all scalings are `first_pass`."""
        weight = self.layers[-1].weight
        assert isinstance(weight, torch.Tensor)
        same = torch.full((1, 1, self.places, self.experts), self.how.first_pass, dtype=weight.dtype)
        self.scalings, self.silent = self._kept(same).to(weight.device), self.how.first_pass == 0

    def then(self, hidden_btc: torch.Tensor) -> None:
        """It is read again, after the frozen model has made these last hidden states of it."""
        self.scalings, self.silent = self._kept(self._given(hidden_btc)), False

    def _given(self, hidden_btc: torch.Tensor) -> torch.Tensor:
        weight = next(self.parameters())
        if not torch.is_autocast_enabled(hidden_btc.device.type):
            hidden_btc = hidden_btc.to(weight.dtype)
        logits = self.layers(hidden_btc).unflatten(-1, (self.places, self.experts))
        return (logits / self.how.temperature).softmax(-1) if self.how.softmax else logits

    def _kept(self, scalings_btpn: torch.Tensor) -> torch.Tensor:
        """The `top_k` largest of a token, the others zero; a softmax over those that are not, if wanted."""
        if self.how.top_k is not None:
            places = scalings_btpn.topk(self.how.top_k, dim=-1).indices
            scalings_btpn = scalings_btpn * torch.zeros_like(scalings_btpn).scatter(-1, places, 1.0)
        if self.how.top_k_softmax:
            none = scalings_btpn == 0
            scalings_btpn = scalings_btpn.masked_fill(none, -torch.inf).softmax(-1).masked_fill(none, 0.0)
        return scalings_btpn

    def at(self, place: int, x: torch.Tensor, rows: Callable[[int], torch.Tensor] | None) -> torch.Tensor:
        """Scalings for what a place reads, x `[b, t, …]` or `[b·t, …]`: of x's shape but for the last dimension, n.

        `rows` tells which rows of so many x has, where it may not have all. Raises RequestError outside of a reading,
        and where x has not a row for each token.
        """
        if self.scalings is None:
            raise RequestError("a mixture of experts reads a text twice: call the whole model, not a part of it")
        found = self.scalings[:, :, place if self.how.layerwise else 0]
        if found.shape[:2] == (1, 1):
            return found[0, 0]
        if rows is not None and x.dim() > 2 and len(found) != len(x):
            found = found[rows(len(found)).to(found.device)]
        found = found.flatten(0, 1) if x.dim() == 2 else found
        if found.shape[:-1] != x.shape[:-1]:
            raise RequestError(
                f"expected experts at layers that read every token, found one that reads {list(x.shape)} of "
                f"{list(self.scalings.shape[:2])} tokens: train them at other places (`on`)"
            )
        return found


class Mixed:
    """A linear layer with experts: what one mixture makes of it. `experts[n]`: the n-th one's sites here."""

    affine = False

    def __init__(self, stack: Adapters, name: str, mixer: Mixer, number: int, junction: Junction):
        self.stack, self.name, self.mixer, self.number = stack, name, mixer, number
        self.experts: list[list[LowRank]] = [junction.sites.get(one, []) for one in mixer.point.of]  # type: ignore[misc]
        first = next(site for sites in self.experts for site in sites)
        self.place, self.module, self.point = first.place, first.module, mixer.point

    def forward(self, h: torch.Tensor, x: torch.Tensor | None, weight: float = 1.0) -> torch.Tensor:
        """h + weight · g · Σₙ λₙ sₙ · upₙ downₙ x."""
        if self.mixer.silent:
            return h
        assert x is not None
        rows = None if self.stack.rows is None else lambda count: self.stack.rows_of(self.name, count)
        scalings = self.mixer.at(self.number, x, rows)[..., None].unbind(-2)
        weight = weight * self.mixer.how.weight
        for scaling, sites in zip(scalings, self.experts, strict=True):
            for site in sites:
                change, scale = _change(site, x, scaling).to(h.dtype), float(site.scale) * weight
                h = torch.add(h, change, alpha=scale) if torch.is_grad_enabled() else h.add_(change, alpha=scale)
        return h

    __call__ = forward


def _change(site: LowRank, x: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """λ · up(down(x)), in the type of the expert's weights."""
    x = x if torch.is_autocast_enabled(x.device.type) else x.to(site.down.dtype)
    low = functional.linear(x if site.dropout is None else site.dropout(x), site.down)
    return functional.linear(low * scaling.to(low.dtype), site.up)


def mixed(stack: Adapters, model: PreTrainedModel, name: str, point: Point) -> list[Mixed]:
    """A fresh mixture of experts that are in the stack already, at every linear layer that one of them changes.

    Raises RequestError for adapters that are no LoRA, and for encoder–decoders, of whose two texts neither has all
    the scalings.
    """
    if model.config.is_encoder_decoder:
        raise RequestError(
            f"{type(model).__name__}: a mixture of experts needs one text whose hidden states tell of each token, "
            "found an encoder–decoder: put adapters together with `adapt`, or learn a `fusion` of them"
        )
    if stack.twice is None:
        stack.twice = Twice(stack, model)
    paths = {id(module): path for path, module in model.named_modules()}
    inside = {paths[id(module)] for module in stack.twice.body.modules()}
    for one in point.of:
        _check_expert(stack, one, inside)
    order = {path: number for number, path in enumerate(paths.values())}
    hung = [junction for junction in stack.junctions.values() if isinstance(junction, Junction)]
    places = [junction for junction in hung if any(junction.sites.get(one) for one in point.of)]
    places.sort(key=lambda junction: order[junction.place.target])
    mixer = Mixer(point, stack.twice.channels, len(places))
    return [Mixed(stack, name, mixer, number, junction) for number, junction in enumerate(places)]


def _check_expert(stack: Adapters, name: str, inside: set[str]) -> None:
    """Raises RequestError for an adapter that is no LoRA, or changes something outside of the model's body."""
    for point in stack.points[name]:
        plain = point.form == "linear" and point.insertion == "parallel" and not point.directions
        if not plain or point.start != "zero" or point.composition == "gated" or point.scale == "learned":
            raise RequestError(f"{name}: expected a LoRA adapter as an expert, found {_kind(point)}")
    for site in stack.sites[name].values():
        if not site.place.single or not isinstance(site, LowRank):
            raise RequestError(f"{name}: expected a LoRA adapter as an expert, found one beside {site.place.path}")
        if site.place.target not in inside:
            raise RequestError(
                f"{name}: expected an expert inside of the model's body, found one at {site.place.target}, which reads "
                "less than the whole text"
            )


def _kind(point: Point) -> str:
    """What makes a point no plain LoRA."""
    if point.form != "linear" or point.insertion != "parallel":
        return f"the form {point.form}, inserted {point.insertion}"
    return "DoRA" if point.directions else "PiSSA" if point.start != "zero" else "a learned scale or gate"


class Twice:
    """Around every call of a model's body: the first reading before it, scalings for as long as it runs."""

    def __init__(self, stack: Adapters, model: PreTrainedModel):
        self.stack = stack
        whole: Any = model.base_model
        decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else whole
        # some models call this part of their body only; others call something else so
        self.body = decoder if any(module is decoder for module in whole.modules()) else whole
        self.channels = self._channels(model)
        self.parameters = list(inspect.signature(self.body.forward).parameters)
        self.second: Any = None
        self.handles = [
            self.body.register_forward_pre_hook(self.before, with_kwargs=True),
            self.body.register_forward_hook(self.behind, always_call=True),
        ]

    def _channels(self, model: PreTrainedModel) -> int:
        """Those of the last hidden states, by trying; by its configuration where a skeleton cannot be called."""
        seen: list[int] = []
        handle = self.body.register_forward_hook(lambda module, args, output: seen.append(_last(output).shape[-1]))
        try:
            call_briefly(model)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            if model.device.type != "meta":
                raise
        finally:
            handle.remove()
        return seen[-1] if seen else width_of(model)

    def before(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read the text with the frozen model and let the classifiers say what comes of it."""
        mixers = self.stack.mixers()
        if not mixers:
            return None
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        first = {name: value for name, value in given.items() if name not in ASKED}
        for name in KEPT:
            if given.get(name) is not None:
                first[name] = second_of(_known(given[name]), body.config)
        for mixer in mixers:
            mixer.first()
        with _plainly(body):
            read = body.forward(**first)
        for mixer in mixers:
            mixer.then(_last(read))
        self.second = None if any(given.get(name) is not None for name in KEPT) else _cache_in(read)
        if torch.is_grad_enabled():
            self._carry()
        return (), given

    def behind(self, body: Any, args: Any, output: Any) -> None:
        """The second reading is over; a cache that it made holds the first as well."""
        second, self.second = self.second, None
        for mixer in self.stack.mixers():
            mixer.scalings, mixer.silent = None, False
        made = None if second is None or output is None else _cache_in(output)
        for layer, other in zip(made.layers, second.layers, strict=True) if made is not None else ():
            pair(layer, other)

    def _carry(self) -> None:
        """What is computed again for the backward pass is to be computed with the scalings of its own call."""
        for module in self.body.modules():
            how = module.__dict__.get("_gradient_checkpointing_func")
            if how is not None and not isinstance(how, _Carried):
                module._gradient_checkpointing_func = _Carried(how, self.stack)

    def release(self) -> None:
        """Take the hooks away, and what checkpointing functions were wrapped in."""
        for handle in self.handles:
            handle.remove()
        for module in self.body.modules():
            how = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(how, _Carried):
                module._gradient_checkpointing_func = how.how


class _Carried:
    """A checkpointing function whose second computation sees the scalings that its first one saw."""

    def __init__(self, how: Callable[..., Any], stack: Adapters):
        self.how, self.stack = how, stack

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        held = [(mixer, mixer.scalings, mixer.silent) for mixer in self.stack.mixers()]

        def with_them(*inner: Any, **how: Any) -> Any:
            before = [(mixer, mixer.scalings, mixer.silent) for mixer, _, _ in held]
            _put(held)
            try:
                return function(*inner, **how)
            finally:
                _put(before)

        return self.how(with_them, *args, **kwargs)


def _put(held: Sequence[tuple[Mixer, torch.Tensor | None, bool]]) -> None:
    for mixer, scalings, silent in held:
        mixer.scalings, mixer.silent = scalings, silent


@contextmanager
def _plainly(body: Any) -> Iterator[None]:
    """Inside, nothing is kept for a backward pass, nor computed again for one."""
    held = [module for module in body.modules() if getattr(module, "gradient_checkpointing", False)]
    # a weight that was cast for a call without gradients would be taken for the next as well, and learn nothing
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    for module in held:
        module.gradient_checkpointing = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)
        for module in held:
            module.gradient_checkpointing = True


def _known(kept: Any) -> Any:
    from transformers.cache_utils import Cache, EncoderDecoderCache

    if not isinstance(kept, Cache) or isinstance(kept, EncoderDecoderCache):
        raise RequestError(
            f"expected a cache of layers of keys and values, found {type(kept).__name__}: a mixture of experts reads "
            "each text twice and keeps both there; call the model with `use_cache=False`"
        )
    return kept


def _cache_in(output: Any) -> Any:
    """The cache that a call gives back; None where it gives none."""
    from transformers.cache_utils import Cache

    values = output if isinstance(output, tuple) else [output.get(name) for name in KEPT]
    return next((value for value in values if isinstance(value, Cache)), None)


def _last(output: Any) -> torch.Tensor:
    """The last hidden states `[b, t, c]` that a body gives."""
    return output[0] if isinstance(output, tuple) else output.last_hidden_state
