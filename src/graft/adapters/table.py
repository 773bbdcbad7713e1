"""The design space as a table: what each named method is, written from its points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graft.adapters.point import SUBLAYERS, Point

FORMS = {
    "linear": "x Wdown Wup",
    "bottleneck": "{f}(x Wdown) Wup",
    "softmax": "softmax(q Pkᵀ) Pv",
    "scale": "h ⊙ l",
    "bias": "b",
    "tokens": "softmax(q Pkᵀ) Pv, P from learned tokens",
    "invertible": "(F(e₂), G(o₁)), undone before the head",
    "fusion": "softmaxₙ(Q h · K δₙ) V δₙ",
    "mixture": "Σₙ λₙ δₙ, λ from the last hidden states",
}
"""Δh of each form; x stands for h where the point is inserted after the module."""

PARAMETERS = {
    "linear": "r(i+o)",
    "bottleneck": "r(i+o)",
    "softmax": "2·r·k",
    "scale": "o",
    "bias": "o",
    "tokens": "r·d in all",
    "invertible": "2·r·o",
    "fusion": "3·o²",
    "mixture": "(d+1)·n in all",
}
"""Numbers at one place."""

LEGEND = (
    "x: what a module reads; h: what it gives; Δh: what the adapter makes of them; composition: how it joins h.\n"
    "Parameters at one place: r the size, i and o channels in and out, k channels of keys, d of the model, "
    "n adapters.\n"
    "s: scale, g: learned gate (0 at first), λ: attention's share on learned keys.\n"
    "folds: whether it can become part of the weights (`fold: true`)."
)
"""What the letters stand for."""


def rows(methods: Mapping[str, Sequence[Point]], model: Any = None) -> list[dict[str, str]]:
    """A row a point: form, insertion, places, composition, parameters; counted where `model` (a skeleton) is given."""
    return [_row(name, point, model) for name, points in methods.items() for point in points]


def _row(name: str, point: Point, model: Any) -> dict[str, str]:
    row = {
        "method": name,
        "Δh": _form(point),
        "inserted": point.insertion,
        "at": ", ".join(point.on),
        "composition": _composition(point),
        "parameters": _parameters(point),
        "folds": "yes" if folds(point) else "no",
    }
    return row | ({"in this model": counted(model, [point])} if model is not None else {})


def folds(point: Point) -> bool:
    """Whether the point is a change of the weights and biases of single layers."""
    spans = any(word in SUBLAYERS for place in point.on for word in place.split("|"))
    return point.form in ("linear", "scale", "bias") and not spans


def _form(point: Point) -> str:
    form = FORMS[point.form].format(f=point.nonlinearity)
    return form.replace("x ", "h ") if point.insertion == "after" else form


def _composition(point: Point) -> str:
    if point.form in ("softmax", "tokens"):
        return "(1-gλ)h + gλΔh" if point.gate else "(1-λ)h + λΔh"
    scale = point.scale if point.scale == "learned" else f"{point.scale:g}"
    return {"add": "h + Δh", "scaled": f"h + sΔh, s = {scale}", "gated": "h + g(Δh - h)"}[point.composition]


def _parameters(point: Point) -> str:
    formula = PARAMETERS[point.form]
    formula += "+r+o" if point.form == "bottleneck" and point.biases else ""
    formula += ", g a head" if point.form in ("softmax", "tokens") and point.gate else ""
    return formula + (f", r = {point.size}" if point.size else "")


def counted(model: Any, points: Sequence[Point]) -> str:
    """Trained numbers in `model`, and their share of it; what is in the way where the points do not fit it."""
    import copy

    from graft.adapters.stack import adopt
    from graft.adapters.trial import passed_by
    from graft.errors import RequestError

    tried = copy.deepcopy(model)
    try:
        stack = adopt(tried, points)
        passed = passed_by(tried, stack)
    except RequestError as error:
        return f"not here: {str(error).partition(': ')[2].partition(';')[0]}"
    except (RuntimeError, NotImplementedError):  # a skeleton of experts cannot be called
        return "told once its weights are loaded"
    if passed:
        return f"not here: the model takes the weight of {passed[0]} without calling it"
    whole = sum(p.numel() for p in model.parameters())
    count = stack.count("adapter")
    return f"{count:,} ({100 * count / whole:.2g} %)"
