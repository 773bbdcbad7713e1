"""A model that tells what comes behind token sequences, its tokens in the order of their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from graft.ensemble.byte_level.cover import Told
from graft.ensemble.byte_level.spelling import Spelling
from graft.ensemble.byte_level.trie import Trie
from graft.errors import CannotCombine, RunError

KEPT = 2**24
"""Log-probabilities of what comes behind single tokens that are kept, and as many running totals."""
AT_ONCE = 2**16
"""Log-probabilities that are summed at once: as many as stay in a core's cache."""


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

    def guess(self, token: int) -> Told | None:
        """What comes behind a token where nothing but the start stands before it, if that is known."""
        return self._alone.get(token)

    @property
    def guesses(self) -> Mapping[int, Told]:
        """What comes behind tokens where nothing but the start stands before them, of all of which it is known."""
        return self._alone

    def learn(self, found: Mapping[int, Told]) -> None:
        """Keep what comes behind tokens where nothing but the start stands before them."""
        if (len(self._alone) + len(found)) * len(self.later.ids) > KEPT:
            self._alone.clear()
        self._alone |= found

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
        count, ends = len(trie.ids), self.ends
        order = torch.as_tensor(np.append(trie.ids, ends[:1]), device=logits.device)
        kept = logits.index_select(-1, order).float()
        if len(ends) > 1:
            kept[:, count] = logits[:, ends].float().logsumexp(-1)
        logs = kept.log_softmax(-1).cpu()
        probs = logs.exp()
        totals = torch.empty(len(logs), count + 1, dtype=torch.float64)
        totals[:, 0] = 0
        torch.cumsum(probs[:, :count], -1, dtype=torch.float64, out=totals[:, 1:])
        last = logs[:, count].double().exp().tolist() if ends else [0.0] * len(logs)
        # copies: one that is kept must not keep all that were read with it
        parts = zip(logs[:, :count].numpy(), totals.numpy(), last, strict=True)
        return [Told(trie, own.copy(), sums.copy(), end) for own, sums, end in parts]
