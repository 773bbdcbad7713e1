"""Which member of a mixture speaks at which token: weight times probability, for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft import models
from graft.data.encode import encode_with_places
from graft.ensemble.byte_level import show as byte_show
from graft.ensemble.byte_level.model import EnsembleOverBytes
from graft.ensemble.causal import EnsembleForCausalLM
from graft.ensemble.gate import Gate, Told
from graft.ensemble.reading import common_context, distributions, text_items
from graft.ensemble.sources import Source
from graft.ensemble.spoken import Spoken, colour
from graft.ensemble.union import unmatched_mass
from graft.ensemble.union_said import union_said
from graft.errors import RequestError
from graft.evaluate.scorer import Scorer

if TYPE_CHECKING:
    from rich.text import Text


@torch.inference_mode()
def speaks(folder: Path | str, text: str, *, device: str | None = None) -> Spoken:
    """Who speaks in `text`; over bytes, at which character. Raises RequestError for what is no mixture of decoders, and
    for an empty text."""
    if not text:
        raise RequestError("expected a text to show, found none")
    model = models.load(folder, device=device)
    if isinstance(model, EnsembleOverBytes) and model.config.combine == "linear":
        return byte_show.speaks(model, text)
    if not isinstance(model, EnsembleForCausalLM) or model.config.combine != "linear":
        raise RequestError(
            f"{folder}: expected a mixture (linear) of decoders, or over bytes: only there members share"
        )
    tokenizer = models.load_tokenizer(folder)
    ((found_ids, places),) = encode_with_places([text], tokenizer)
    ids = list(found_ids)
    if not ids:
        raise RequestError("expected a text to show, found none")
    inputs = torch.tensor([[Scorer(model, tokenizer).prefix_token, *ids[:-1]]], device=model.device)
    model._check_inputs(inputs, None)
    given = {"attention_mask": None, "position_ids": None, "logits_to_keep": 0}
    told, found = model.told(inputs, given, None, every=True)
    weights = found.expand(len(ids), -1) if model.gate is None else found[0]
    gold = torch.tensor(ids, device=model.device)[:, None]
    whole = [each.log_probs for each in told if each is not None]
    log_probs = torch.cat([each[0].gather(-1, gold) for each in whole], -1)
    shares = (log_probs + weights.to(log_probs.device).log()).softmax(-1)
    return Spoken(
        tuple(model.config.members[place]["name"] for place in model.active),
        tuple(text[start:end] for start, end in places),
        shares.cpu().numpy(),
        weights.cpu().numpy(),
        log_probs.exp().cpu().numpy(),
        () if model.union is None else tuple(unmatched_mass(model.union, whole)),
    )


def coloured(spoken: Spoken) -> Text:
    """The text for the terminal: each token in the colour of the member with most share in it, a legend below."""
    from rich.text import Text

    shown = Text()
    for token, member in zip(spoken.tokens, spoken.shares.argmax(-1), strict=True):
        shown.append(token, style=colour(int(member)))
    shown.append("\n\n")
    for member, name in enumerate(spoken.names):
        shown.append(f"{name} {spoken.shares[:, member].mean():.0%}  ", style=f"bold {colour(member)}")
    if spoken.unmatched:
        shown.append(f"\n{spoken.lost()}")
    return shown


def page(spoken: Spoken) -> str:
    """The same as one HTML page without scripts: hovering shows every member's weight, probability and share."""
    style = "body{font:16px/1.6 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}pre{white-space:pre-wrap}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Who speaks</title><style>{style}</style>'
        f"<p>{spoken.legend()}</p><pre>{spoken.words()}</pre></html>\n"
    )


@torch.inference_mode()
def spoken_by(
    sources: Sequence[Source],
    weights: Sequence[float],
    gate: dict[str, Any] | None,
    text: str,
    device: str | None = None,
) -> Spoken:
    """Who speaks in `text` where these members are mixed, one after the other in memory; as much as all can read."""
    folders = list(dict.fromkeys(source.folder for source in sources))
    (item,) = text_items(folders, [text])
    context, width = common_context(folders)
    made = Gate.from_plain(gate) if gate else None
    states = made.looks_at if made is not None and made.states else []
    read = [
        distributions(source, [item], context=context, width=width, device=device, states=number in states)
        for number, source in enumerate(sources)
    ]
    log_probs = torch.cat([each.log_probs.gather(-1, each.gold[:, None]) for each in read], -1)
    shares = torch.tensor([weights]).expand(len(log_probs), -1)
    if made is not None:
        shares = made.decide([Told(read[n].log_probs, read[n].states) for n in made.looks_at])
    return _spoken(sources, text, log_probs, shares)


def spoken_in_union(
    sources: Sequence[Source], weights: Sequence[float], text: str, device: str | None = None
) -> Spoken:
    """The same of members of several vocabularies, in the tokens of their union."""
    said = union_said(sources, [text], device)
    log_probs = torch.from_numpy(said.log_probs.T).float()
    return _spoken(sources, text, log_probs, torch.tensor([weights]).expand(len(log_probs), -1), tuple(said.unmatched))


def _spoken(
    sources: Sequence[Source],
    text: str,
    log_probs: torch.Tensor,
    shares: torch.Tensor,
    unmatched: tuple[float, ...] = (),
) -> Spoken:
    """Of `log_probs` and weights `[tokens, members]` of the text's tokens, as the first member cuts it."""
    ((_, places),) = encode_with_places([text], models.load_tokenizer(sources[0].folder))
    return Spoken(
        tuple(source.name for source in sources),
        tuple(text[start:end] for start, end in places[: len(log_probs)]),
        (log_probs + shares.log()).softmax(-1).numpy(),
        shares.numpy(),
        log_probs.exp().numpy(),
        unmatched,
    )
