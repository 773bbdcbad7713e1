"""A point of the design space of adapters (He et al. 2022, arXiv:2110.04366, section 3.3). Light: pydantic only.

A frozen module computes h from x. A point says which Δh is worked out from which of the two, and how it joins h.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from graft.errors import RequestError
from graft.settings import Settings

Form = Literal["linear", "bottleneck", "softmax", "scale", "bias", "tokens", "invertible", "fusion", "mixture"]
Nonlinearity = Literal["relu", "gelu", "silu", "tanh", "sigmoid"]

SIZED = ("linear", "bottleneck", "softmax", "tokens", "invertible")
"""Forms that have a size."""

JOINING = ("fusion", "mixture")
"""Forms that put other adapters together."""

SUBLAYERS = ("attention", "cross_attention", "feed_forward")
LINEARS = ("linears", "attention_linears", "cross_attention_linears", "feed_forward_linears")
ROLES = ("query", "key", "value", "kv", "qkv", "output", "up", "down")
EXPERTS = ("experts", "experts_up", "experts_down")
"""Parameters that hold a matrix of each of several experts."""
WORDS = (*SUBLAYERS, *LINEARS, *ROLES, *EXPERTS, "intermediate", "biases", "input")
"""Places that every model is searched for; anything else is a pattern of names of linear layers."""

_RANGE = re.compile(r"(-?\d*):(-?\d*)")


def with_weights(active: str | Sequence[str] | Mapping[str, float] | None) -> list[tuple[str, float]]:
    """A name, several, names with weights, or none, as names with weights. Raises RequestError for other weights than
    finite numbers."""
    names = [active] if isinstance(active, str) else active or []
    pairs = list(names.items()) if isinstance(names, Mapping) else [(name, 1.0) for name in names]
    for name, weight in pairs:
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise RequestError(f"expected a finite number as the weight of {name}, found {weight!r}")
    return [(name, float(weight)) for name, weight in pairs]


def chosen(layers: str | list[int] | None, count: int) -> list[int]:
    """The blocks out of `count` that `layers` names. Raises ValueError for what is no range."""
    if layers is None:
        return list(range(count))
    if isinstance(layers, str):
        found = _RANGE.fullmatch(layers.strip())
        if not found:
            raise ValueError(f"expected layers such as 0:6, -4: or [0, 5], found {layers!r}")
        return list(range(count))[slice(*(int(end) if end else None for end in found.groups()))]
    return [layer % count for layer in layers if -count <= layer < count]


def beyond(layers: str | list[int] | None, count: int) -> bool:
    """Whether `layers` names blocks that a model of `count` blocks does not have, or none at all."""
    if isinstance(layers, list):
        return any(not -count <= layer < count for layer in layers)
    if layers is None:
        return False
    start, end = (int(word) if word else 0 for word in layers.strip().split(":"))
    return not (-count <= start < count and -count <= end <= count) or not chosen(layers, count)


def _readable(layers: Any) -> Any:
    if layers == []:
        raise ValueError("expected blocks such as [0, 5], found none; leave `layers` out for all of them")
    chosen(layers, 1)
    return layers


Layers = Annotated[
    str | list[int] | None,
    AfterValidator(_readable),
    Field(description="Which blocks of each stack, from 0: `0:6`, `-4:`, `[0, 5]`; none: all."),
]
"""A choice of blocks."""


class Mixture(Settings):
    """How X-LoRA mixes its experts (Buehler & Buehler 2024): a classifier of the frozen model's last hidden states."""

    depth: Annotated[int, Field(ge=1, description="Linear layers of the classifier.")] = 1
    width: Annotated[int, Field(ge=1, description="Channels between its layers.")] = 2048
    dropout: Annotated[float, Field(ge=0, lt=1, description="Share dropped between its layers, in training.")] = 0.2
    layerwise: Annotated[bool, Field(description="Scalings of its own for every linear layer, not one for all.")] = (
        False
    )
    softmax: Annotated[bool, Field(description="The scalings of a token sum to one.")] = True
    temperature: Annotated[float, Field(gt=0, description="What logits are divided by before that.")] = 1.0
    top_k: Annotated[int | None, Field(ge=1, description="Experts that a token keeps; the others' are zero.")] = None
    top_k_softmax: Annotated[bool, Field(description="A softmax over the scalings that are kept.")] = False
    first_pass: Annotated[
        float, Field(description="The experts' scaling while the text is read for the classifier; 0: the frozen model.")
    ] = 0.0
    weight: Annotated[float, Field(description="What all scalings are multiplied by.")] = 1.0
    train_experts: Annotated[bool, Field(description="Train the experts as well.")] = False


class Point(Settings):
    """One point: what Δh is, from where, at which places, and how it joins h. It starts as the identity."""

    form: Annotated[
        Form,
        Field(
            description="`linear`: down and up, no non-linearity; `bottleneck`: one between them; `softmax`: over "
            "learned keys, giving learned values; `scale`: a factor for each channel; `bias`: a constant; `tokens`: "
            "learned embeddings before the text; `invertible`: a coupling of the embeddings' halves, undone before the "
            "head; `fusion`: attention over the changes of other adapters; `mixture`: LoRA adapters, each times what a "
            "classifier of the frozen model's hidden states says of the token (X-LoRA)."
        ),
    ]
    on: Annotated[
        list[str],
        Field(
            min_length=1,
            description="Places. Sublayers: `attention`, `cross_attention`, `feed_forward`. Single linear layers: "
            "`query`, `key`, `value`, `kv`, `qkv`, `output`, `up`, `down`, `linears` (all in the blocks but routers), "
            "`attention_linears`, `cross_attention_linears`, `feed_forward_linears`. Experts that lie in one "
            "parameter: `experts`, `experts_up`, `experts_down`. `intermediate`: what the "
            "feed-forward's last layer reads; `biases`: every layer that has one; `input`: before the first token. "
            "Or patterns of names such as `*.q_proj`. `before NAME`: what such a layer reads; `key|kv|qkv`: the first "
            "that a block has.",
        ),
    ]
    layers: Layers = None
    insertion: Annotated[
        Literal["parallel", "after"], Field(description="Δh from the module's input x, or from its output h.")
    ] = "parallel"
    composition: Annotated[
        Literal["add", "scaled", "gated"],
        Field(description="h + Δh; h + s·Δh; or h + g·(Δh - h), g learned and zero at first."),
    ] = "add"
    scale: Annotated[float | Literal["learned"], Field(description="s of `scaled`; `learned` starts at 1.")] = 1.0
    size: Annotated[
        int | None, Field(ge=1, description="Rank, width of the bottleneck, number of learned keys or tokens.")
    ] = None
    nonlinearity: Annotated[Nonlinearity, Field(description="That of the bottleneck.")] = "relu"
    biases: Annotated[bool, Field(description="Biases in the bottleneck.")] = False
    dropout: Annotated[float, Field(ge=0, lt=1, description="Share of the input that is dropped in training.")] = 0.0
    start: Annotated[
        Literal["zero", "pissa"],
        Field(
            description="Linear: `down` random and `up` zero, or both from the largest singular values of the frozen "
            "weight, less their own product (PiSSA)."
        ),
    ] = "zero"
    directions: Annotated[
        bool, Field(description="Linear: train the length of each row of the weight beside its direction (DoRA).")
    ] = False
    up_rate: Annotated[
        float, Field(gt=0, description="Learning rate of what starts at zero, as a multiple (LoRA+).")
    ] = 1.0
    gate: Annotated[
        bool,
        Field(
            description="Softmax and tokens: a learned gate for each head, zero at first, so that it starts as the "
            "identity; without it as published."
        ),
    ] = True
    gate_rate: Annotated[
        float,
        Field(
            gt=0,
            description="Learning rate of a gate (`gate`, `composition: gated`), as a multiple: it starts at zero, and "
            "what is behind it learns only as far as it is open.",
        ),
    ] = 1.0
    shift: Annotated[
        bool, Field(description="Softmax: learned keys take up positions, so that the text begins behind them.")
    ] = False

    of: Annotated[
        list[str],
        Field(description="Fusion and mixture: the adapters that are put together; none named: those that are active."),
    ] = []
    mixture: Annotated[Mixture | None, Field(description="Mixture: its classifier; none given: one linear layer.")] = (
        None
    )

    @property
    def gated(self) -> bool:
        """Whether it has a learned gate."""
        return self.composition == "gated" or (self.gate and self.form in ("softmax", "tokens"))

    @model_validator(mode="after")
    def _check(self) -> Point:
        if (self.form in SIZED) != (self.size is not None):
            need = "a size" if self.form in SIZED else "no size"
            raise ValueError(f"expected {need} for the form {self.form!r}, found {self.size}")
        if self.composition != "scaled" and self.scale != 1.0:
            raise ValueError(f"a scale goes with composition: scaled, found composition: {self.composition}")
        if self.gate_rate != 1.0 and not self.gated:
            raise ValueError(f"expected gate_rate beside a gate, found it with form {self.form!r} without one")
        linear_only = [name for name in ("start", "directions") if getattr(self, name) not in ("zero", False)]
        if linear_only and (self.form != "linear" or self.insertion != "parallel"):
            raise ValueError(f"{linear_only[0]} is for linear points in parallel, found form {self.form!r}")
        if self.form == "tokens" and self.on != ["input"]:
            raise ValueError(f"learned tokens stand at the input: expected `on: [input]`, found {self.on}")
        if self.form != "tokens" and "input" in self.on:
            raise ValueError(f"only learned tokens stand at the input, found form {self.form!r}")
        for forms, place in ((("invertible",), "embeddings"), (JOINING, "adapters")):
            if (self.form in forms) != (self.on == [place]):
                named = self.form if self.form in forms else forms[0]
                raise ValueError(f"the form {named} goes with `on: [{place}]`, found {self.form} on {self.on}")
        if self.of and self.form not in JOINING:
            raise ValueError(f"`of` names the adapters of a fusion or mixture, found it beside the form {self.form}")
        if self.form in JOINING and (unread := self._beside({"form", "on", "of", "mixture"})):
            raise ValueError(f"a {self.form} stands where its adapters do, and takes no `{unread[0]}`: leave it out")
        if len(set(self.of)) < len(self.of):
            raise ValueError(f"expected every adapter of a {self.form} once, found {', '.join(self.of)}")
        if self.mixture is not None and self.form != "mixture":
            raise ValueError(f"`mixture` goes with the form mixture, found it beside the form {self.form}")
        attention = {"attention", "cross_attention"}
        if self.form == "softmax" and (not attention >= set(self.on) or self.insertion != "parallel"):
            raise ValueError("learned keys stand beside those of attention, in parallel: use `on: [attention]`")
        if self.form == "bias" and "biases" not in self.on and self.insertion == "parallel":
            raise ValueError("a bias is added to what a module gives: use `on: [biases]` or `insertion: after`")
        if "biases" in self.on and self.form not in ("bias", "scale"):
            raise ValueError(f"a bias may be shifted or multiplied: expected the form bias or scale, found {self.form}")
        if self.form == "scale" and self.insertion != "after":
            raise ValueError("a scale multiplies what is there: use `insertion: after`")
        if self.names_experts and (why := self.not_at_experts()):
            raise ValueError(why)
        ahead = {f"before {word}" for word in EXPERTS} & {word for place in self.on for word in place.split("|")}
        if ahead:
            raise ValueError(f"fused experts take LoRA beside them, found {min(ahead)!r}: leave out `before`")
        return self

    def _beside(self, read: set[str]) -> list[str]:
        """Settings other than `read` that are not as they are where nothing is said."""
        fields = type(self).model_fields
        return [name for name in fields if name not in read and getattr(self, name) != fields[name].default]

    @property
    def names_experts(self) -> bool:
        """Whether it stands at fused experts by their word; a pattern of names may find them too."""
        return any(word in EXPERTS for place in self.on for word in place.split("|"))

    def not_at_experts(self) -> str:
        """Why this point cannot stand at experts that lie in one parameter, whose outputs no module gives apart; empty
        where it can."""
        wrong = {
            f"form {self.form}": self.form != "linear",
            f"insertion {self.insertion}": self.insertion != "parallel",
            f"composition {self.composition}": self.composition == "gated",
            "PiSSA": self.start == "pissa",
            "DoRA": self.directions,
        }
        if not any(wrong.values()):
            return ""
        found = ", ".join(name for name, there in wrong.items() if there)
        return (
            "fused experts take plain LoRA (form linear, in parallel, composition add or scaled), "
            f"found {found}: use that, or other places (`on`)"
        )
