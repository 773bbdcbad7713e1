"""What members say about a text, read once and kept: whole distributions at the tokens that weights are fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft import models
from graft.data.encode import encode
from graft.data.examples import Encoder
from graft.data.render import render
from graft.ensemble.classification import labels_of
from graft.ensemble.gate import last_state
from graft.ensemble.sources import Source
from graft.errors import CannotCombine
from graft.evaluate.limits import longest_context
from graft.evaluate.scorer import Scorer
from graft.products import quick_layers

BYTES = 2**28
"""Distributions of one member that are kept at most; of longer texts, tokens at even distances are."""


@dataclass(frozen=True)
class Item:
    """Ids of what is predicted, `target`, and for encoder-decoders of what is read first, `source`."""

    target: list[int]
    source: list[int] | None = None


def text_items(folders: Sequence[Path], texts: Sequence[str]) -> list[Item]:
    """Each text's tokens. Raises CannotCombine where the members' tokenizers cut the texts differently."""
    cut = [encode(list(texts), models.load_tokenizer(folder)) for folder in folders]
    return _alike([[Item(list(ids)) for ids in each] for each in cut])


def pair_items(folders: Sequence[Path], records: Sequence[dict[str, Any]], format: str) -> list[Item]:
    """Each record's source and target as in training. Raises CannotCombine where the members cut them differently."""
    return _alike([_pairs(models.load_tokenizer(folder), records, format) for folder in folders])


def _pairs(tokenizer: Any, records: Sequence[dict[str, Any]], format: str) -> list[Item]:
    found = []
    for rendered in render(records, format, tokenizer):
        source = rendered.ids[~rendered.trained].tolist()
        source = source[1:] if source and source[0] == tokenizer.bos_token_id else source
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        found.append(Item(rendered.ids[rendered.trained].tolist(), [*source, *end]))
    return found


def _alike(cut: Sequence[list[Item]]) -> list[Item]:
    if any(items != cut[0] for items in cut[1:]):
        raise CannotCombine("the members cut the text into different tokens: their predictions cannot be matched")
    return cut[0]


def common_context(folders: Sequence[Path]) -> tuple[int, int]:
    """Tokens that every member can read at once, and the size of the vocabulary that all of them have."""
    configs = [models.load_config(folder) for folder in folders]
    return min(map(longest_context, configs)), min(int(config.get_text_config().vocab_size) for config in configs)


@dataclass(frozen=True)
class Read:
    """`log_probs [tokens, vocabulary] float32` of a member, the token that comes (`gold`), its text's place, and where
    they were asked for the last hidden states `[tokens, channels] float32`."""

    log_probs: torch.Tensor
    gold: torch.Tensor
    texts: torch.Tensor
    states: torch.Tensor | None = None


@quick_layers()
@torch.inference_mode()
def distributions(
    source: Source,
    items: Sequence[Item],
    *,
    context: int,
    width: int,
    device: str | None = None,
    most: int = BYTES,
    states: bool = False,
) -> Read:
    """What a member gives at the tokens of the items, each cut to `context` tokens, over `width` tokens of vocabulary.

    Where that is more than `most` bytes, tokens at even distances are kept, for every member the same. `states`: the
    last hidden states too.
    """
    scorer = Scorer(source.load(device), models.load_tokenizer(source.folder))
    stride = max(1, -(-sum(min(len(item.target), context) for item in items) * width * 4 // most))
    asked = {"output_hidden_states": True} if states else {}
    kept, gold, texts, hidden, seen = [], [], [], [], 0
    for number, item in enumerate(items):
        target = item.target[:context]
        places = torch.arange(-seen % stride, len(target), stride)
        seen += len(target)
        if len(places):
            found = scorer.model(**inputs_of(scorer, item, target, context), **asked)
            kept.append(found.logits[0, places.to(scorer.device), :width].float().log_softmax(-1).cpu())
            hidden += [last_state(found, source.name)[0, places.to(scorer.device)].cpu()] if states else []
            gold.append(torch.tensor(target)[places])
            texts.append(torch.full((len(places),), number))
    return Read(torch.cat(kept), torch.cat(gold), torch.cat(texts), torch.cat(hidden) if states else None)


@dataclass(frozen=True)
class Said:
    """`log_probs [tokens] float64` of the tokens that come, and the likeliest tokens `best [tokens]`."""

    log_probs: np.ndarray
    best: np.ndarray


@quick_layers()
@torch.inference_mode()
def said(source: Source, items: Sequence[Item], *, context: int, width: int, device: str | None = None) -> Said:
    """What a model gives at every token of the items, each cut to `context` tokens; two numbers a token are kept."""
    scorer = Scorer(source.load(device), models.load_tokenizer(source.folder))
    gold, best = [], []
    for item in items:
        target = item.target[:context]
        if target:
            logits = scorer.model(**inputs_of(scorer, item, target, context)).logits[0, :, :width].float()
            wanted = torch.tensor(target, device=logits.device)[:, None]
            gold.append(logits.log_softmax(-1).gather(-1, wanted)[:, 0].double().cpu().numpy())
            best.append(logits.argmax(-1).cpu().numpy())
    return Said(np.concatenate(gold), np.concatenate(best))


def inputs_of(scorer: Scorer, item: Item, target: list[int], context: int) -> dict[str, Any]:
    """What the model is asked: the target up to each token, for encoder-decoders behind the source."""
    if item.source is None or not scorer.encoder_decoder:
        ids = torch.tensor([[scorer.prefix_token, *target[:-1]]], device=scorer.device)
        return {"input_ids": ids, "use_cache": False}
    start, read = scorer.model.config.decoder_start_token_id, item.source
    read = read if len(read) <= context else [*read[: context - 1], read[-1]]
    return {
        "input_ids": torch.tensor([read], device=scorer.device),
        "decoder_input_ids": torch.tensor([[start, *target[:-1]]], device=scorer.device),
        "use_cache": False,
    }


@quick_layers()
@torch.inference_mode()
def classes(source: Source, texts: Sequence[str], labels: Sequence[str], device: str | None = None) -> Read:
    """A classifier's log-probabilities of each text's classes `[texts, classes]`, the label's number as `gold`.

    Raises CannotCombine for a label that the classifier does not know.
    """
    model, tokenizer = source.load(device), models.load_tokenizer(source.folder)
    known = {name: int(number) for number, name in labels_of(model.config.to_dict()).items()}
    unknown = sorted(set(labels) - set(known))
    if unknown:
        raise CannotCombine(f"{source.name} knows the labels {', '.join(known)}, found {unknown[0]!r} in the data")
    encoder = Encoder(tokenizer, longest_context(model.config), list(known))
    rows = encoder.classified([{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)])
    ids = [torch.from_numpy(row["input_ids"])[None].to(model.device) for row in rows]
    told = [model(input_ids=own).logits.float().cpu() for own in ids]
    gold = torch.tensor([known[label] for label in labels])
    return Read(torch.cat(told).log_softmax(-1), gold, torch.arange(len(texts)))
