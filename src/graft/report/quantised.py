"""What packing a model's weights costs in each score, and what tuning adapters on the packed model wins back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from graft.report.judge import apart, decimals, difference, gap_places, half, p_text
from graft.report.read import Column, Model, Run, is_number
from graft.report.words import fixed


@dataclass(frozen=True)
class Gap:
    """How much worse `model` scores than `other`, in the unit of the score; below zero it is better."""

    model: str
    other: str
    worse_by: float
    half: float | None
    """Longer side of the 95 % interval; None where the pair was not compared."""
    p: float | None
    """Of the paired test."""
    places: int
    """Decimals that the difference deserves."""

    @property
    def words(self) -> str:
        """`0.0067 ±0.0012 (p < 0.001)`, without a sign."""
        size = fixed(abs(self.worse_by), self.places)
        interval = f" ±{fixed(self.half, self.places)}" if self.half is not None else ""
        return f"{size}{interval} ({p_text(self.p)})" if self.p is not None else f"{size}{interval}"

    @property
    def tested(self) -> str:
        """`0.03`, `< 0.001`, a dash where the pair was not tested."""
        return "–" if self.p is None else p_text(self.p).removeprefix("p ").removeprefix("= ")

    @property
    def signed(self) -> str:
        """`+0.0067 ±0.0012`: above zero where it is worse."""
        interval = f" ±{fixed(self.half, self.places)}" if self.half is not None else ""
        return f"{fixed(self.worse_by, self.places, sign=True)}{interval}"


@dataclass(frozen=True)
class Tuned:
    """A model that was tuned on packed weights, against these and against what they were packed from."""

    name: str
    value: str
    packed: Gap
    base: Gap
    alike: Gap | None
    """Against the same tuning on the weights as they were before packing, where the family has it."""

    @property
    def words(self) -> str:
        """What it wins back, as half a sentence."""
        if self.packed.worse_by >= 0:
            said = f"{self.name}, tuned on it, wins nothing back ({self.value})"
        else:
            how = "better" if self.base.worse_by < 0 else "worse"
            said = f"{self.name}, tuned on it, wins back {self.packed.words} and is {self.base.words} {how} than "
            said += f"{self.base.other} ({self.value})"
        if self.alike is None:
            return said
        how = "better" if self.alike.worse_by < 0 else "worse"
        return f"{said}, {self.alike.words} {how} than the same tuning on plain weights, {self.alike.other}"


@dataclass(frozen=True)
class Packing:
    """A model in few bits beside the one it was packed from, in one column."""

    column: Column
    name: str
    value: str
    base_value: str
    bits: int
    cost: Gap
    tuned: tuple[Tuned, ...]

    @property
    def words(self) -> str:
        """A sentence."""
        verb = "costs" if self.cost.worse_by >= 0 else "gains"
        said = (
            f"{self.name}: packing {self.cost.other} into {self.bits} bits {verb} {self.cost.words} on "
            f"{self.column.title}, {self.base_value} → {self.value}"
        )
        return "; ".join([said, *(tuned.words for tuned in self.tuned)])

    def plain(self) -> dict[str, Any]:
        """As JSON-ready values."""
        said = {key: value for key, value in asdict(self).items() if not key.endswith("value")}
        for tuned in said["tuned"]:
            del tuned["value"]
        return said


def packings(run: Run) -> Iterator[Packing]:
    """Every model in 8 or 4 bits whose base was measured too, in every column."""
    for model in run.models.values():
        bits = (model.manifest.get("settings") or {}).get("bits") if model.verb == "quantize" else None
        if bits not in (4, 8) or len(model.parents) != 1:
            continue
        for column in run.columns:
            base = model.parents[0]
            if (cost := _gap(run, column, model.name, base)) is not None:
                tuned = (_tuned(run, column, each, model.name, base) for each in run.models.values())
                found = tuple(each for each in tuned if each is not None)
                value, before = _values(run, column, model.name, base, cost.places)
                yield Packing(column, model.name, value, before, bits, cost, found)


def _tuned(run: Run, column: Column, model: Model, packed: str, base: str) -> Tuned | None:
    if model.verb != "tune" or packed not in model.parents:
        return None
    won, left = _gap(run, column, model.name, packed), _gap(run, column, model.name, base)
    if won is None or left is None:
        return None
    value, _ = _values(run, column, model.name, packed, won.places)
    twin = next((other for other in run.models.values() if _alike(model, other, packed, base)), None)
    return Tuned(model.name, value, won, left, _gap(run, column, model.name, twin.name) if twin else None)


MAY_DIFFER = {
    "from", "optimizer", "precision", "accumulate", "gradient_checkpointing", "compile", "parallel", "checkpoint_every",
    "track", "fold",
}  # fmt: skip
"""Settings in which two trainings that are the same but for their base may differ: how and where numbers are held."""


def _alike(model: Model, other: Model, packed: str, base: str) -> bool:
    """Whether `other` is the training of `model` on the weights as they were before packing."""
    if other.verb != "tune" or base not in other.parents or packed in other.parents or not other.made:
        return False
    ours, theirs = (each.manifest.get("settings") or {} for each in (model, other))
    return all(ours.get(name) == theirs.get(name) for name in (ours.keys() | theirs.keys()) - MAY_DIFFER)


def _gap(run: Run, column: Column, model: str, other: str) -> Gap | None:
    """None where one of the two was not measured."""
    own, against = run.row(model, column), run.row(other, column)
    if own is None or against is None:
        return None
    worse_by = (own["value"] - against["value"]) * (-1 if column.higher_is_better else 1)
    compared = difference(run, column, model, other)
    row = compared[0] if compared else {}
    p = row.get("p")
    return Gap(
        model, other, worse_by, half(row) if row else None, p if is_number(p) else None,
        gap_places(run, column, model, other),
    )  # fmt: skip


def _values(run: Run, column: Column, a: str, b: str, places: int) -> tuple[str, str]:
    """Two scores with as many decimals as tell them apart."""
    one, other = (float(run.scores[name, column]["value"]) for name in (a, b))
    shown = apart(one, other, max(decimals(run, column), min(places, 4)))
    return fixed(one, shown), fixed(other, shown)
