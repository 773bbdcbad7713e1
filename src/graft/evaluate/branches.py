"""Rows whose requests are branches of one text, read under a mask in which each token sees only what leads to it.

Whether a model honours such masks is found out on the model itself, on the longest rows there are, by comparing with
plain rows; where it does not, there are no answers, and plain rows are to be read.
"""

from __future__ import annotations

from typing import Any

import torch

from graft.errors import RunError
from graft.evaluate.limits import can_branch, least_window
from graft.evaluate.reading import Answers, Reader
from graft.evaluate.sharing import Row


class Branches:
    """Reads branches with `reader`; `style` is the kind of mask that the model honours (None: not known yet).

    Without `share` no such rows are read.
    """

    def __init__(self, reader: Reader, share: bool):
        self.reader = reader
        self.style: str | None = None if share and can_branch(reader.model) else "plain"
        self._window = least_window(reader.model.config)
        self._proved = (0, 0)
        self._prefix: tuple[tuple[int, ...], Any] | None = None

    def forget(self) -> None:
        """Give the memory of the last prefix back."""
        self._prefix = None

    def answers(self, rows: list[Row]) -> Answers | None:
        """Answers of rows behind one prefix; None where the model cannot read rows as long as these.

        Rows longer than any before are not trusted: some of their branches are read alone and must come out the same.
        """
        extent = (
            rows[0].prefix + max(len(row.tokens) for row in rows),
            max(len(request.tokens) for row in rows for request in row.requests),
        )
        if self._window is not None and max(extent) >= self._window:
            return None
        proved = all(size <= known for size, known in zip(extent, self._proved, strict=True))
        for style in [self.style] if self.style else ["bool", "additive"]:
            if proved:
                return self._read(rows, style)
            found = self._tried(rows, style)
            if found and self._agrees(found, rows):
                self.style = style
                self._proved = max(extent[0], self._proved[0]), max(extent[1], self._proved[1])
                return found
        self.style = "plain"
        return None

    def _tried(self, rows: list[Row], style: str) -> Answers | None:
        """The answers, or None from a model that cannot take such a mask or cache, which each says in its own way."""
        if style == "plain":
            return None
        try:
            return self._read(rows, style)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, RunError):
            return None

    def _agrees(self, found: Answers, rows: list[Row]) -> bool:
        """Whether a second branch, the last one of the longest row and the longest request score as they do alone."""
        row = max(rows, key=lambda row: len(row.tokens))
        longest = max((r for row in rows for r in row.requests), key=lambda r: len(r.tokens))
        witnesses = {r.index: r for r in (*row.requests[1:2], row.requests[-1], longest)}
        alone = dict(pair for part in self.reader.plain(list(witnesses.values())) for pair in part)
        tree = dict(found)
        scale = 1e-3 if next(self.reader.model.parameters()).dtype == torch.float32 else 0.1
        return all(abs(alone[i].log_prob - tree[i].log_prob) < scale * max(1, alone[i].tokens / 16) for i in alone)

    def _read(self, rows: list[Row], style: str) -> Answers:
        """Rows read behind their prefix under a mask that keeps branches apart."""
        prefix, longest = rows[0].prefix, max(len(row.tokens) for row in rows)
        inputs = torch.zeros(len(rows), longest, dtype=torch.long)
        positions = torch.zeros(len(rows), longest, dtype=torch.long)
        seen = torch.zeros(len(rows), 1, longest, prefix + longest, dtype=torch.bool)
        seen[:, :, :, :prefix] = True
        for place, row in enumerate(rows):
            size = len(row.tokens)
            inputs[place, :size] = torch.tensor(row.tokens)
            positions[place, :size] = torch.tensor(row.positions)
            seen[place, 0, :size, prefix : prefix + size] = row.seen()
            seen[place, 0, size:, prefix] = True
        cache = self._read_prefix(rows[0].requests[0].tokens[:prefix]) if prefix else None
        logits = self.reader.forward(
            inputs.to(self.reader.device),
            mask=self._mask(seen.to(self.reader.device), style),
            positions=positions.to(self.reader.device),
            cache=None if cache is None else _repeated(cache, prefix, len(rows)),
            prompts=[row.prompt for row in rows],
        )
        requests = [request for row in rows for request in row.requests]
        return self.reader.gathered(
            requests, logits, [(place, here) for place, row in enumerate(rows) for here in row.places]
        )

    def _read_prefix(self, tokens: tuple[int, ...]) -> Any:
        """A cache that holds the tokens; the last one made is kept for the rows behind it."""
        from transformers import DynamicCache

        if self._prefix is None or self._prefix[0] != tokens:
            self._prefix = None
            cache = DynamicCache(config=self.reader.model.config)
            self.reader.forward(torch.tensor([list(tokens)], device=self.reader.device), cache=cache, keep=1)
            self._prefix = (tokens, cache)
        return self._prefix[1]

    def _mask(self, seen: torch.Tensor, style: str) -> torch.Tensor:
        if style == "bool":
            return seen
        dtype = next(self.reader.model.parameters()).dtype
        return torch.zeros(seen.shape, device=seen.device, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _repeated(cache: Any, tokens: int, times: int) -> Any:
    """A copy of a cache of one row of `tokens`, for `times` rows; the original stays as it is.

    Raises ValueError where the model did not put the keys and values of every token into it.
    """
    import copy

    from graft.adapters.second_cache import readings

    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in [reading for each in made.layers for reading in readings(each)]:
        if layer.keys is None or layer.keys.shape[2] != tokens:
            raise ValueError(f"expected a cache of {tokens} tokens, found another one")
        layer.keys = layer.keys.expand(times, -1, -1, -1)
        layer.values = layer.values.expand(times, -1, -1, -1)
    return made
