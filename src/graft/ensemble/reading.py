"""What members say about a text, read once and kept: whole distributions at the tokens that weights are fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from graft import models
from graft.ensemble.gate import last_state
from graft.errors import CannotCombine
from graft.evaluate.scorer import Scorer, longest_context

BYTES = 2**28
"""Distributions of one member that are kept at most; of longer texts, tokens at even distances are."""


def token_ids(folders: Sequence[Path], texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text's tokens. Raises CannotCombine where the members' tokenizers cut the texts differently."""
    cut = [models.load_tokenizer(folder)(list(texts), add_special_tokens=False)["input_ids"] for folder in folders]
    if any(ids != cut[0] for ids in cut[1:]):
        raise CannotCombine("the members cut the text into different tokens: their predictions cannot be matched")
    return cut[0]


def common_context(folders: Sequence[Path]) -> tuple[int, int]:
    """Tokens that every member can read at once, and the size of the vocabulary that all of them have."""
    configs = [models.load_config(folder) for folder in folders]
    return min(map(longest_context, configs)), min(int(config.vocab_size) for config in configs)


@dataclass(frozen=True)
class Read:
    """`log_probs [tokens, vocabulary] float32` of a member, the token that comes (`gold`), its text's place, and where
    they were asked for the last hidden states `[tokens, channels] float32`."""

    log_probs: torch.Tensor
    gold: torch.Tensor
    texts: torch.Tensor
    states: torch.Tensor | None = None


@torch.inference_mode()
def distributions(
    folder: Path,
    ids: Sequence[Sequence[int]],
    *,
    context: int,
    width: int,
    device: str | None = None,
    most: int = BYTES,
    states: bool = False,
) -> Read:
    """What a member gives at the tokens of the texts, each cut to `context` tokens, over `width` tokens of vocabulary.

    Where that is more than `most` bytes, tokens at even distances are kept, for every member the same. `states`: the
    last hidden states too.
    """
    scorer = Scorer(models.load(folder, device=device), models.load_tokenizer(folder))
    stride = max(1, -(-sum(min(len(text), context) for text in ids) * width * 4 // most))
    asked = {"output_hidden_states": True} if states else {}
    kept, gold, texts, hidden, seen = [], [], [], [], 0
    for number, text in enumerate(list(each[:context]) for each in ids):
        places = torch.arange(-seen % stride, len(text), stride)
        seen += len(text)
        if len(places):
            inputs = torch.tensor([[scorer.prefix_token, *text[:-1]]], device=scorer.device)
            found = scorer.model(input_ids=inputs, use_cache=False, **asked)
            kept.append(found.logits[0, places.to(scorer.device), :width].float().log_softmax(-1).cpu())
            hidden += [last_state(found, str(folder))[0, places.to(scorer.device)].cpu()] if states else []
            gold.append(torch.tensor(text)[places])
            texts.append(torch.full((len(places),), number))
    return Read(torch.cat(kept), torch.cat(gold), torch.cat(texts), torch.cat(hidden) if states else None)
