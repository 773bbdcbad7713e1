"""Which member speaks at which token, for the terminal and as a page: in a mixture its weight times its probability, in
a product how far it pulls towards the token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft import models
from graft.data.encode import encode_with_places
from graft.ensemble.byte_level import show as byte_show
from graft.ensemble.byte_level.model import EnsembleOverBytes
from graft.ensemble.causal import EnsembleForCausalLM
from graft.ensemble.gate import Gate, Told
from graft.ensemble.pulls import pulls
from graft.ensemble.reading import common_context, distributions, text_items
from graft.ensemble.settings import HAVE_PARTS
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
    """Who speaks in `text`; over bytes, at which character. Raises RequestError for what is no mixture or product of
    decoders, and for an empty text."""
    if not text:
        raise RequestError("expected a text to show, found none")
    model = models.load(folder, device=device)
    kinds = (EnsembleForCausalLM, EnsembleOverBytes)
    if not isinstance(model, kinds) or model.config.combine not in HAVE_PARTS:
        raise RequestError(
            f"{folder}: expected a mixture or a product of decoders ({', '.join(HAVE_PARTS)}), whose members have "
            "parts in a token, or adapters with a fusion, found "
            f"{getattr(model.config, 'combine', type(model).__name__)}"
        )
    if isinstance(model, EnsembleOverBytes):
        return byte_show.speaks(model, text)
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
    product = model.config.combine != "linear"
    if product:
        shares = pulls([each[0] for each in whole], model.mixed(told, found, None)[0], found, gold)
    else:
        shares = (log_probs + weights.to(log_probs.device).log()).softmax(-1)
    return Spoken(
        tuple(model.config.members[place]["name"] for place in model.active),
        tuple(text[start:end] for start, end in places),
        shares.cpu().numpy(),
        weights.cpu().numpy(),
        log_probs.exp().cpu().numpy(),
        () if model.union is None else tuple(unmatched_mass(model.union, whole)),
        product,
    )


def coloured(spoken: Spoken) -> Text:
    """The text for the terminal: each token in the colour of the member with most share in it, a legend below."""
    from rich.text import Text

    shown = Text()
    for place, token in enumerate(spoken.tokens):
        member = spoken.speaker(place)
        shown.append(token, style="" if member is None else colour(member))
    shown.append("\n\n")
    for member, name in enumerate(spoken.names):
        shown.append(f"{name} {spoken.mean(member)}  ", style=f"bold {colour(member)}")
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
    combine: Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor] | None = None,
) -> Spoken:
    """Who speaks in `text` where these members are mixed, or where there is a rule to `combine` them by make a product;
    one after the other in memory; as much as all can read."""
    folders = list(dict.fromkeys(source.folder for source in sources))
    (item,) = text_items(folders, [text])
    context, width = common_context(folders)
    made = Gate.from_plain(gate) if gate else None
    states = made.looks_at if made is not None and made.states else []
    read = [
        distributions(source, [item], context=context, width=width, device=device, states=number in states)
        for number, source in enumerate(sources)
    ]
    gold = read[0].gold[:, None]
    log_probs = torch.cat([each.log_probs.gather(-1, gold) for each in read], -1)
    shares = torch.tensor([weights]).expand(len(log_probs), -1)
    if combine is not None:
        told = [each.log_probs for each in read]
        pulled = pulls(told, combine(told, shares[0]), shares[0], gold)
        return _spoken(sources, text, log_probs, shares, pulled=pulled)
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
    weights: torch.Tensor,
    unmatched: tuple[float, ...] = (),
    pulled: torch.Tensor | None = None,
) -> Spoken:
    """Of `log_probs` and weights `[tokens, members]` of the text's tokens, as the first member cuts it; of a product
    with how far members pulled."""
    ((_, places),) = encode_with_places([text], models.load_tokenizer(sources[0].folder))
    shares = (log_probs + weights.log()).softmax(-1) if pulled is None else pulled
    return Spoken(
        tuple(source.name for source in sources),
        tuple(text[start:end] for start, end in places[: len(log_probs)]),
        shares.numpy(),
        weights.numpy(),
        log_probs.exp().numpy(),
        unmatched,
        pulled is not None,
    )
