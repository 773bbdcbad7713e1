"""Which member of a mixture speaks at which token: weight times probability, for the terminal and as a page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graft import models
from graft.ensemble.causal import EnsembleForCausalLM
from graft.errors import RequestError
from graft.evaluate.scorer import Scorer

if TYPE_CHECKING:
    from rich.text import Text

COLOURS = ("#4c9be8", "#e8894c", "#4cc38a", "#c77ddb", "#d9c04a", "#e86a7c", "#6ad0d6", "#a0a0a0")


@dataclass(frozen=True)
class Spoken:
    """`shares [tokens, members]`: the part of a token's probability that is a member's, λᵢ pᵢ / Σ λⱼ pⱼ; `weights` and
    `probs` of the same shape are what it is made of."""

    names: tuple[str, ...]
    tokens: tuple[str, ...]
    shares: np.ndarray
    weights: np.ndarray
    probs: np.ndarray

    def plain(self) -> dict[str, Any]:
        """JSON-ready values: each token with each member's weight, probability and share; the mean shares."""
        tokens = []
        for place, token in enumerate(self.tokens):
            columns = zip(self.names, self.weights[place], self.probs[place], self.shares[place], strict=True)
            parts = {n: {"weight": float(w), "probability": float(p), "share": float(s)} for n, w, p, s in columns}
            tokens.append({"token": token, "members": parts})
        return {"mean_shares": dict(zip(self.names, map(float, self.shares.mean(0)), strict=True)), "tokens": tokens}


@torch.inference_mode()
def speaks(folder: Path | str, text: str, *, device: str | None = None) -> Spoken:
    """Who speaks in `text`. Raises RequestError for what is no mixture over one vocabulary, and for an empty text."""
    model = models.load(folder, device=device)
    if not isinstance(model, EnsembleForCausalLM) or model.config.combine != "linear" or model.union is not None:
        raise RequestError(
            f"{folder}: expected a mixture (linear) of decoders of one vocabulary: only there members share"
        )
    tokenizer = models.load_tokenizer(folder)
    cut = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = cut["input_ids"]
    if not ids:
        raise RequestError("expected a text to show, found none")
    inputs = torch.tensor([[Scorer(model, tokenizer).prefix_token, *ids[:-1]]], device=model.device)
    model._check_inputs(inputs, None)
    given = {"attention_mask": None, "position_ids": None, "logits_to_keep": 0}
    told, found = model.told(inputs, given, None, every=True)
    weights = found.expand(len(ids), -1) if model.gate is None else found[0]
    gold = torch.tensor(ids, device=model.device)[:, None]
    log_probs = torch.cat([each[0].gather(-1, gold) for each in told if each is not None], -1)
    shares = (log_probs + weights.to(log_probs.device).log()).softmax(-1)
    return Spoken(
        tuple(model.config.members[place]["name"] for place in model.active),
        tuple(text[start:end] for start, end in cut["offset_mapping"]),
        shares.cpu().numpy(),
        weights.cpu().numpy(),
        log_probs.exp().cpu().numpy(),
    )


def coloured(spoken: Spoken) -> Text:
    """The text for the terminal: each token in the colour of the member with most share in it, a legend below."""
    from rich.text import Text

    shown = Text()
    for token, member in zip(spoken.tokens, spoken.shares.argmax(-1), strict=True):
        shown.append(token, style=_colour(int(member)))
    shown.append("\n\n")
    for member, name in enumerate(spoken.names):
        shown.append(f"{name} {spoken.shares[:, member].mean():.0%}  ", style=f"bold {_colour(member)}")
    return shown


def page(spoken: Spoken) -> str:
    """The same as one HTML page without scripts: hovering shows every member's weight, probability and share."""
    words = "".join(_word(spoken, place) for place in range(len(spoken.tokens)))
    legend = " ".join(
        f'<b style="color:{_colour(member)}">{html.escape(name)} {spoken.shares[:, member].mean():.0%}</b>'
        for member, name in enumerate(spoken.names)
    )
    style = "body{font:16px/1.6 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}pre{white-space:pre-wrap}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Who speaks</title><style>{style}</style>'
        f"<p>{legend}</p><pre>{words}</pre></html>\n"
    )


def _word(spoken: Spoken, place: int) -> str:
    columns = zip(spoken.names, spoken.weights[place], spoken.probs[place], spoken.shares[place], strict=True)
    told = "\n".join(f"{n}: {w:.3f} × {p:.3g} = {s:.0%}" for n, w, p, s in columns)
    member = int(spoken.shares[place].argmax())
    strength = round(100 * float(spoken.shares[place, member]) / 2)
    colour = f"background:color-mix(in srgb,{_colour(member)} {strength}%,transparent)"
    return f'<span style="{colour}" title="{html.escape(told)}">{html.escape(spoken.tokens[place])}</span>'


def _colour(member: int) -> str:
    return COLOURS[member % len(COLOURS)]
