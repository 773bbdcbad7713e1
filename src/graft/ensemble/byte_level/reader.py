"""A model that tells what comes behind token sequences, its tokens in the order of their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graft.ensemble.byte_level.cover import END, Told
from graft.ensemble.byte_level.spelling import Spelling
from graft.ensemble.byte_level.trie import Trie
from graft.errors import CannotCombine, RunError

KEPT = 2**25
"""Log-probabilities of what comes behind single tokens that are kept."""
AT_ONCE = 2**22
"""Log-probabilities that are summed at once."""


class Reader:
    """A model that tells what comes behind token sequences.

    `limit`: tokens that the model can read; a longer sequence goes on from its newest half. `forwards` and
    `tokens_read` count what it was asked. Raises CannotCombine for a vocabulary of which the model has no token.
    """

    def __init__(self, model: Any, spelling: Spelling, *, limit: int | None = None, name: str = "the model"):
        self.model, self.name, self.limit, self.spelling = model, name, limit, spelling
        self.size = int(model.config.vocab_size)
        later = [each if i < self.size else None for i, each in enumerate(spelling.later)]
        first = [each if i < self.size else None for i, each in enumerate(spelling.first)]
        self.later = Trie(later)
        self.first = self.later if first == later else Trie(first)
        if not len(self.later.ids):
            raise CannotCombine(f"{name} has no token that writes text")
        self.start, self.ends = spelling.start, [i for i in spelling.ends if i < self.size]
        self.style: str | None = None
        self._alone: dict[int, Told] = {}
        self._parts: dict[int, list[int]] = {}
        self.forwards, self.tokens_read = 0, 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(self.model.parameters()).dtype

    @torch.inference_mode()
    def whole(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits `[len(tokens), vocabulary]` of a sequence read from its start, without a cache."""
        return self.forward(torch.tensor([list(tokens)]))[0]

    def parts(self, token: int) -> list[int]:
        """Tokens that this one begins with, the longest left out."""
        if token not in self._parts:
            node, found = self.later.root, []
            for byte in (self.spelling.later[token] or b"")[:-1]:
                node = node.next(byte) or node
                found += [int(self.later.ids[node.low])] if node.own else []
            self._parts[token] = found
        return self._parts[token]

    def guess(self, token: int) -> Told | None:
        """What comes behind a token where nothing but the start stands before it, if that is known."""
        return self._alone.get(token)

    @torch.inference_mode()
    def alone(self, tokens: Sequence[int]) -> None:
        """Find out what comes behind each token where nothing but the start stands before it, and keep it."""
        if len(self._alone) * len(self.later.ids) > KEPT:
            self._alone.clear()
        new = [token for token in dict.fromkeys(tokens) if token not in self._alone]
        if new:
            ids = torch.tensor([[self.start, token] for token in new])
            self._alone |= zip(new, self.told(self.forward(ids)[:, -1]), strict=True)

    def forward(self, ids: torch.Tensor, **given: Any) -> torch.Tensor:
        """The model's logits on ids `[rows, length]`. Raises RunError, naming the model, where they are NaN."""
        self.forwards += 1
        self.tokens_read += ids.numel()
        given = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in given.items()}
        given.setdefault("use_cache", False)
        logits = self.model(input_ids=ids.to(self.device), **given).logits
        if torch.isnan(logits[..., 0]).any():
            raise RunError(f"{self.name} gives NaN logits: check its weights")
        return logits

    def told(self, logits: torch.Tensor, first: bool = False) -> list[Told]:
        """Of logits `[n, vocabulary]` what cover needs: probabilities over the tokens that write text and the end."""
        trie = self.first if first else self.later
        size = max(1, AT_ONCE // max(1, len(trie.ids)))
        return [told for part in logits.split(size) for told in self._told(part, trie)]

    def _told(self, logits: torch.Tensor, trie: Trie) -> list[Told]:
        order = torch.as_tensor(trie.ids, device=logits.device)
        kept = logits.index_select(-1, order).float()
        if self.ends:
            kept = torch.cat([kept, logits[:, self.ends].float().logsumexp(-1, keepdim=True)], -1)
        told = kept.log_softmax(-1)
        behind = told[:, trie.root.own : len(trie.ids)].exp().double().cpu().numpy()
        logs = told.cpu().numpy()
        root = np.zeros((len(logs), END + 1))
        if len(trie.root.starts):
            root[:, trie.root.bytes] = np.add.reduceat(behind, trie.root.starts, axis=1)
        if self.ends:
            root[:, END] = np.exp(logs[:, -1], dtype=np.float64)
        return [Told(trie, own[: len(trie.ids)].copy(), sums) for own, sums in zip(logs, root, strict=True)]
