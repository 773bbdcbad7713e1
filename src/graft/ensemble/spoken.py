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
    """`shares [tokens, members]`: what a member has in a token, `weights` and `probs` of the same shape what it is made
    of. In a mixture that is the part of the token's probability that is the member's, λᵢ pᵢ / Σ λⱼ pⱼ; in a `product`
    its pull in nats, λᵢ (log pᵢ - what λᵢ log pᵢ would be on average, of tokens drawn from the product).
    `unmatched [members]`: of a union of vocabularies the mean mass that each member gives to tokens which not all
    members have."""

    names: tuple[str, ...]
    tokens: tuple[str, ...]
    shares: np.ndarray
    weights: np.ndarray
    probs: np.ndarray
    unmatched: tuple[float, ...] = ()
    product: bool = False

    @property
    def kind(self) -> str:
        """What `shares` are called."""
        return "pull" if self.product else "share"

    def plain(self) -> dict[str, Any]:
        """JSON-ready values: each token with each member's weight, probability and share (or pull); the means of
        these."""
        tokens = []
        for place, token in enumerate(self.tokens):
            columns = zip(self.names, self.weights[place], self.probs[place], self.shares[place], strict=True)
            parts = {n: {"weight": float(w), "probability": float(p), self.kind: float(s)} for n, w, p, s in columns}
            tokens.append({"token": token, "members": parts})
        lost = {"unmatched_mass": dict(zip(self.names, self.unmatched, strict=True))} if self.unmatched else {}
        means = dict(zip(self.names, map(float, self.shares.mean(0)), strict=True))
        return {f"mean_{self.kind}s": means, **lost, "tokens": tokens}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Spoken:
        """What `plain` gave. Raises KeyError, TypeError or ValueError for anything else."""
        product = "mean_pulls" in plain
        names = tuple(plain["mean_pulls" if product else "mean_shares"])
        kinds = ("pull" if product else "share", "weight", "probability")
        parts = [
            np.array([[each["members"][n][kind] for n in names] for each in plain["tokens"]], float) for kind in kinds
        ]
        lost = tuple(map(float, plain.get("unmatched_mass", {}).values()))
        tokens = tuple(str(each["token"]) for each in plain["tokens"])
        return cls(names, tokens, parts[0], parts[1], parts[2], lost, product)

    def mean(self, member: int) -> str:
        """A member's mean share, or its mean pull, in words."""
        mean = float(self.shares[:, member].mean())
        return f"{mean:+.2f} nats" if self.product else f"{mean:.0%}"

    def speaker(self, place: int) -> int | None:
        """The member with most in a token; None where no member of a product pulls towards it."""
        member = int(self.shares[place].argmax())
        return None if self.shares[place, member] <= 0 else member

    def legend(self) -> str:
        """The members in their colours with their mean shares, as HTML."""
        members = " ".join(
            f'<b style="color:{colour(member)}">{html.escape(name)} {self.mean(member)}</b>'
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
        if self.product:
            told = "\n".join(
                f"{n}: probability {p:.3g}, weight {w:+.3f}, pulls {s:+.2f} nats" for n, w, p, s in columns
            )
        else:
            told = "\n".join(f"{n}: {w:.3f} × {p:.3g} = {s:.0%}" for n, w, p, s in columns)
        member, parts = self.speaker(place), np.abs(self.shares[place])
        strength = 0 if member is None else round(50 * float(parts[member] / parts.sum()))
        shade = f"background:color-mix(in srgb,{colour(member or 0)} {strength}%,transparent)"
        return f'<span style="{shade}" title="{html.escape(told)}">{html.escape(self.tokens[place])}</span>'


def colour(member: int) -> str:
    """The colour of a member."""
    return COLOURS[member % len(COLOURS)]
