"""Who speaks at which token of a text, as numbers and as HTML that is read by hovering. Light."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

COLOURS = ("#4c9be8", "#e8894c", "#4cc38a", "#c77ddb", "#d9c04a", "#e86a7c", "#6ad0d6", "#a0a0a0")
FILE = "speaks.json"
"""Where an ensemble's folder keeps a text with who speaks in it."""


@dataclass(frozen=True)
class Spoken:
    """`shares [tokens, members]`: the part of a token's probability that is a member's, λᵢ pᵢ / Σ λⱼ pⱼ; `weights` and
    `probs` of the same shape are what it is made of. `unmatched [members]`: of a union of vocabularies the mean mass
    that each member gives to tokens which not all members have."""

    names: tuple[str, ...]
    tokens: tuple[str, ...]
    shares: np.ndarray
    weights: np.ndarray
    probs: np.ndarray
    unmatched: tuple[float, ...] = ()

    def plain(self) -> dict[str, Any]:
        """JSON-ready values: each token with each member's weight, probability and share; the mean shares."""
        tokens = []
        for place, token in enumerate(self.tokens):
            columns = zip(self.names, self.weights[place], self.probs[place], self.shares[place], strict=True)
            parts = {n: {"weight": float(w), "probability": float(p), "share": float(s)} for n, w, p, s in columns}
            tokens.append({"token": token, "members": parts})
        lost = {"unmatched_mass": dict(zip(self.names, self.unmatched, strict=True))} if self.unmatched else {}
        means = dict(zip(self.names, map(float, self.shares.mean(0)), strict=True))
        return {"mean_shares": means, **lost, "tokens": tokens}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Spoken:
        """What `plain` gave. Raises KeyError, TypeError or ValueError for anything else."""
        names = tuple(plain["mean_shares"])
        kinds = ("share", "weight", "probability")
        parts = [
            np.array([[each["members"][n][kind] for n in names] for each in plain["tokens"]], float) for kind in kinds
        ]
        lost = tuple(map(float, plain.get("unmatched_mass", {}).values()))
        tokens = tuple(str(each["token"]) for each in plain["tokens"])
        return cls(names, tokens, parts[0], parts[1], parts[2], lost)

    def legend(self) -> str:
        """The members in their colours with their mean shares, as HTML."""
        members = " ".join(
            f'<b style="color:{colour(member)}">{html.escape(name)} {self.shares[:, member].mean():.0%}</b>'
            for member, name in enumerate(self.names)
        )
        return f"{members} <small>{html.escape(self.lost())}</small>" if self.unmatched else members

    def lost(self) -> str:
        """How much of a union's mass is passed on rather than mixed, in words."""
        told = ", ".join(f"{name} {mass:.1%}" for name, mass in zip(self.names, self.unmatched, strict=True))
        return f"on tokens that not all members have: {told}"

    def words(self) -> str:
        """The text as HTML, each token in the colour of the member with most share in it; hovering shows every part."""
        return "".join(self._word(place) for place in range(len(self.tokens)))

    def _word(self, place: int) -> str:
        columns = zip(self.names, self.weights[place], self.probs[place], self.shares[place], strict=True)
        told = "\n".join(f"{n}: {w:.3f} × {p:.3g} = {s:.0%}" for n, w, p, s in columns)
        member = int(self.shares[place].argmax())
        strength = round(100 * float(self.shares[place, member]) / 2)
        shade = f"background:color-mix(in srgb,{colour(member)} {strength}%,transparent)"
        return f'<span style="{shade}" title="{html.escape(told)}">{html.escape(self.tokens[place])}</span>'


def colour(member: int) -> str:
    """The colour of a member."""
    return COLOURS[member % len(COLOURS)]
