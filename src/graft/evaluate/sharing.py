"""Which requests are read together, so that what they share is read once. No model is needed here.

Requests are sorted by their tokens. A cluster begins with a prefix that is read into a cache (a few-shot prompt);
behind it, requests that go on alike stand in one row as the branches of a trie, each token seeing what leads to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

WORTH = 32
"""Tokens that requests must share before they are read apart from the rest."""
ROW = 1024
"""Tokens of a row to which branches are still added: attention in a row grows with its square."""
APART = 64
"""What one more cluster costs, in tokens: its rows are not batched with others."""


@dataclass(frozen=True)
class Request:
    """`tokens` as read by the model (all but the last one wanted), `wanted` the tokens predicted at their end."""

    index: int
    tokens: tuple[int, ...]
    wanted: tuple[int, ...]

    @property
    def usable(self) -> int:
        """Tokens that may be read ahead: those before the one that predicts the first wanted."""
        return len(self.tokens) - len(self.wanted)

    @property
    def prompt(self) -> int:
        """Tokens that are read before the first wanted."""
        return self.usable + 1


@dataclass(frozen=True)
class Row:
    """A trie of requests behind `prefix` tokens: `tokens` and `positions` of its nodes, and each request's path."""

    prefix: int
    requests: list[Request]
    tokens: list[int]
    positions: list[int]
    paths: list[list[int]]

    @classmethod
    def of(cls, requests: Sequence[Request], prefix: int) -> Row:
        """Sorted requests that all begin with the same `prefix` tokens, which are not in the row."""
        tokens: list[int] = []
        positions: list[int] = []
        paths: list[list[int]] = []
        before: tuple[int, ...] = ()
        for request in requests:
            shared = max(common(before, request.tokens) - prefix, 0) if paths else 0
            new = request.tokens[prefix + shared :]
            paths.append([*(paths[-1][:shared] if paths else []), *range(len(tokens), len(tokens) + len(new))])
            tokens += new
            positions += range(prefix + shared, len(request.tokens))
            before = request.tokens
        return cls(prefix, list(requests), tokens, positions, paths)

    @property
    def places(self) -> list[list[int]]:
        """Of each request the nodes that predict its wanted tokens."""
        return [path[len(path) - len(r.wanted) :] for path, r in zip(self.paths, self.requests, strict=True)]

    @property
    def prompt(self) -> int:
        """Nodes of the prompt in a row whose requests all have the same: tokens up to the first wanted."""
        return self.requests[0].prompt

    def seen(self) -> torch.Tensor:
        """[nodes, nodes] bool: a token sees itself and what leads to it."""
        seen = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        done = 0
        for path in map(torch.tensor, self.paths):
            new = torch.nonzero(path >= done).flatten()
            seen[path[new][:, None], path[None, :]] = new[:, None] >= torch.arange(len(path))[None, :]
            done = max(done, int(path[-1]) + 1)
        return seen


@dataclass(frozen=True)
class Cluster:
    """`prefix` tokens with which all of `rows` begin; 0 where nothing is read ahead."""

    prefix: int
    rows: list[Row]


def plan(requests: Sequence[Request]) -> tuple[list[Request], list[Cluster]]:
    """(requests that share too little, clusters of the others); `requests` are sorted by their tokens."""
    planned = _Plan(requests)
    alone: list[Request] = []
    clusters: list[Cluster] = []
    loose: list[Row] = []
    for start, end, prefix in planned.divide(0, len(requests)):
        groups = planned.groups(start, end, prefix)
        if prefix:
            clusters.append(Cluster(prefix, [Row.of(requests[a:b], prefix) for a, b in groups]))
            continue
        alone += [requests[a] for a, b in groups if b - a == 1]
        loose += [Row.of(requests[a:b], 0) for a, b in groups if b - a > 1]
    return alone, [*clusters, Cluster(0, loose)] if loose else clusters


def plan_prompts(requests: Sequence[Request]) -> tuple[list[Request], list[Cluster]]:
    """The same for a model that reads a prompt both ways: what a token means in it hangs on all of the prompt, so that
    only requests that share the whole of it stand in one row, and nothing is read ahead."""
    alike: dict[tuple[int, ...], list[Request]] = {}
    for request in requests:
        alike.setdefault(request.tokens[: request.prompt], []).append(request)
    alone = [group[0] for group in alike.values() if len(group) == 1]
    rows = [Row.of(part, 0) for group in alike.values() if len(group) > 1 for part in _short(group)]
    return alone, [Cluster(0, rows)] if rows else []


def _short(group: list[Request]) -> Iterator[list[Request]]:
    """Requests of one prompt in parts whose rows are not much longer than ROW."""
    part: list[Request] = []
    tokens = 0
    for request in group:
        if part and tokens + len(request.wanted) > ROW:
            yield part
            part = []
        tokens = tokens + len(request.wanted) if part else len(request.tokens)
        part.append(request)
    yield part


class _Plan:
    """Where to cut sorted requests, by the tokens that have to be read."""

    def __init__(self, requests: Sequence[Request]):
        self.sizes = [len(request.tokens) for request in requests]
        self.usable = [request.usable for request in requests]
        arrays = [np.array(request.tokens, np.int64) for request in requests]
        self.shared = [_common(a, b) for a, b in itertools.pairwise(arrays)]
        """Tokens with which a request and the next one begin."""
        self.step = max(WORTH, max(self.sizes, default=0) // 200)

    def divide(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Runs (start, end, prefix) of the requests from `start` to `end`, the cheaper of one run and several."""
        if end - start < 2:
            return [(start, end, 0)]
        prefix = min(*self.shared[start : end - 1], *self.usable[start:end])
        prefix = prefix if prefix >= WORTH and len(self.groups(start, end, prefix)) > 1 else 0
        least = min(self.shared[start : end - 1])
        cuts = [i + 1 for i in range(start, end - 1) if self.shared[i] < least + self.step]
        parts = [run for a, b in zip([start, *cuts], [*cuts, end], strict=True) for run in self.divide(a, b)]
        return min(([(start, end, prefix)], parts), key=self._cost)

    def groups(self, start: int, end: int, prefix: int) -> list[tuple[int, int]]:
        """Requests that go on alike behind `prefix`, by a quarter of what is left of them at least: the rows."""
        found = [(start, start + 1)]
        tokens = self.sizes[start] - prefix
        for i in range(start + 1, end):
            more = self.sizes[i] - self.shared[i - 1]
            if (self.shared[i - 1] - prefix) * 4 >= self.sizes[i] - prefix and tokens + more <= ROW:
                found[-1] = (found[-1][0], i + 1)
                tokens += more
            else:
                found.append((i, i + 1))
                tokens = self.sizes[i] - prefix
        return found

    def _cost(self, runs: Sequence[tuple[int, int, int]]) -> int:
        """Tokens to be read; runs without a prefix are read together."""
        cost = APART * sum(prefix > 0 for _, _, prefix in runs)
        for start, end, prefix in runs:
            rows = self.groups(start, end, prefix)
            cost += prefix + sum(self.sizes[a] - prefix for a, _ in rows)
            cost += sum(self.sizes[i] - self.shared[i - 1] for a, b in rows for i in range(a + 1, b))
        return cost


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two requests begin with together."""
    return _common(np.array(first, np.int64), np.array(second, np.int64))


def _common(first: np.ndarray, second: np.ndarray) -> int:
    size = min(len(first), len(second))
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if len(differ) else size
