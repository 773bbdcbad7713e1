"""Which adapter is listened to at which token and place of a text, for the terminal, as numbers and as a page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graft import models
from graft.adapters.composed import Fusion
from graft.adapters.stack import adapters_of
from graft.data.encode import encode_with_places
from graft.errors import RequestError
from graft.folders import CONTEXTS

if TYPE_CHECKING:
    from rich.text import Text

COLOURS = ("#4c9be8", "#e8894c", "#4cc38a", "#c77ddb", "#d9c04a", "#e86a7c", "#6ad0d6", "#a0a0a0")


@dataclass(frozen=True)
class Listened:
    """`shares [places, tokens, adapters]`: what a fusion gives each adapter at a place while the token is read; they
    sum to one, and are zero of adapters that are not there."""

    names: tuple[str, ...]
    places: tuple[str, ...]
    tokens: tuple[str, ...]
    shares: np.ndarray

    def plain(self) -> dict[str, Any]:
        """JSON-ready values: the mean share of each adapter, in all and at each place, and each token's shares by
        place."""
        means = {place: self._named(self.shares[row].mean(0)) for row, place in enumerate(self.places)}
        tokens = [
            {"token": token, "shares": {p: self._named(self.shares[row, n]) for row, p in enumerate(self.places)}}
            for n, token in enumerate(self.tokens)
        ]
        return {"mean_shares": self._named(self.shares.mean((0, 1))), "places": means, "tokens": tokens}

    def _named(self, shares: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, map(float, shares), strict=True))


@torch.inference_mode()
def listens(folder: Path | str, text: str, *, device: str | None = None) -> Listened:
    """Which adapters the fusion in `folder` listens to in `text`, at every place and token.

    Raises RequestError for what has no fusion or several, for encoder-decoders, and for a text that is empty or longer
    than the model reads at once.
    """
    model, tokenizer = models.load(folder, device=device), models.load_tokenizer(folder)
    stack = adapters_of(model)
    points = [point for name, _ in (stack.active if stack else []) for point in stack.points[name]] if stack else []
    fusions = [point for point in points if point.form == "fusion"]
    if stack is None or not fusions:
        raise RequestError(f"{folder}: expected adapters with a fusion that is active, found none: tune one (`fusion`)")
    if len(fusions) > 1:
        raise RequestError(
            f"{folder}: expected one fusion that is active, found {len(fusions)}: leave the others out (`adapt` with "
            "`without`)"
        )
    if model.config.is_encoder_decoder:
        raise RequestError(
            f"{folder}: expected a decoder or an encoder, found an encoder-decoder, which reads two texts"
        )
    ((ids, places),) = encode_with_places([text], tokenizer)
    begin = [] if tokenizer.bos_token_id is None or not model.can_generate() else [tokenizer.bos_token_id]
    reach = next((getattr(model.config, key) for key in CONTEXTS if hasattr(model.config, key)), len(ids) + len(begin))
    if not 0 < len(ids) + len(begin) <= reach or not len(ids):
        raise RequestError(f"expected a text of 1 to {reach - len(begin)} tokens to show, found {len(ids)}")
    with stack.watching() as seen:
        model(input_ids=torch.tensor([[*begin, *ids]], device=model.device))
    sites = [site for name, _ in stack.active for site in stack.sites[name].values() if isinstance(site, Fusion)]
    meeting = {site.place.path: [fusions[0].of.index(name) for name in site.names] for site in sites}
    shares = torch.zeros(len(seen), len(ids), len(fusions[0].of))
    for row, (place, each) in enumerate(seen.items()):  # not all of them meet everywhere
        shares[row, :, meeting[place]] = each[0, len(begin) :].float().cpu()
    tokens = tuple(text[start:end] for start, end in places)
    return Listened(tuple(fusions[0].of), tuple(seen), tokens, shares.numpy())


def coloured(found: Listened) -> Text:
    """For the terminal: each token in the colour of the adapter with most share in it over all places, and below the
    mean shares, in all and at each place."""
    from rich.text import Text

    shown, most = Text(), found.shares.mean(0).argmax(-1)
    for token, adapter in zip(found.tokens, most, strict=True):
        shown.append(token, style=_colour(adapter))
    shown.append("\n\n")
    width = max(map(len, (*found.places, "mean")))
    for place, means in (("mean", found.shares.mean((0, 1))), *zip(found.places, found.shares.mean(1), strict=True)):
        shown.append(f"{place:{width}}")
        for adapter, (name, mean) in enumerate(zip(found.names, means, strict=True)):
            shown.append(f"  {name} {mean:4.0%}", style=_colour(adapter))
        shown.append("\n")
    return shown


def page(found: Listened) -> str:
    """The same as one HTML page without scripts: a row a place, a column a token, in the colour of the adapter with
    most share, the stronger the more; hovering shows every share."""
    style = (
        "body{font:14px/1.5 sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:2px 5px;font-weight:400;"
        "text-align:left;white-space:pre}"
    )
    legend = " ".join(
        f'<b style="color:{_colour(n)}">{html.escape(name)} {found.shares[..., n].mean():.0%}</b>'
        for n, name in enumerate(found.names)
    )
    head = "".join(f"<th>{html.escape(token)}</th>" for token in found.tokens)
    rows = "".join(
        f"<tr><th>{html.escape(place)}</th>{''.join(_cell(found, shares) for shares in found.shares[row])}</tr>"
        for row, place in enumerate(found.places)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>What is listened to</title><style>{style}</style>'
        f"<p>{legend}</p><table><tr><th></th>{head}</tr>{rows}</table></html>\n"
    )


def _cell(found: Listened, shares: np.ndarray) -> str:
    most = int(shares.argmax())
    told = "\n".join(f"{name}: {share:.1%}" for name, share in zip(found.names, shares, strict=True))
    shade = f"color-mix(in srgb,{_colour(most)} {round(80 * float(shares[most]))}%,transparent)"
    return f'<td style="background:{shade}" title="{html.escape(told)}">{shares[most]:.0%}</td>'


def _colour(adapter: int) -> str:
    return COLOURS[int(adapter) % len(COLOURS)]
