"""Known texts scored in few passes, by compiled functions: what `following` does with a state for each byte.

Of what a model gives behind a sequence, a known text needs a short row: for every number of bytes on, the probability
of the tokens that go on beyond them and that of those which end there. So no probabilities of whole vocabularies are
kept. In each pass a text reads on along the sequence that will be likeliest, by what comes behind its tokens alone, as
far as that is likely enough, with everything beside it that what was read before has been found to need. Where there is
no machine code, or a byte that no sequence writes, texts are followed as others are.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graft.adapters.second_cache import readings
from graft.ensemble.byte_level import _layout as at
from graft.ensemble.byte_level.arrays import address, kernels
from graft.ensemble.byte_level.columns import Columns, Places, cache_of, move
from graft.ensemble.byte_level.cover import Told
from graft.ensemble.byte_level.forest import LOGITS, style_of
from graft.ensemble.byte_level.packed import Piece, blocks_of, packing
from graft.ensemble.byte_level.reader import AT_ONCE, Reader
from graft.ensemble.byte_level.walking import TREES, Tries, Walk

if TYPE_CHECKING:
    from graft.ensemble.byte_level.byte_model import ByteModel

COLUMNS = 488
"""Columns for which there is room in a tree from the beginning, where texts are long enough."""
AHEAD, BEHIND = 0.3, 0.05
"""How likely a sequence is to lead on, as far as is known, up to where it is read: of texts that are ahead of others,
and that are behind them."""
TOKENS, LEAST, MOST = 384, 24, 64
"""Tokens of the leading sequences of all texts that a pass reads on, about, and of one text at least and at most."""


def serves(model: ByteModel) -> bool:
    """Whether known texts can be scored here: packed, all token sequences counting, with a compiler."""
    return model.cover.tokenisations == "all" and style_of(model.reader) == "packed" and kernels() is not None


def walked(model: ByteModel, texts: Sequence[bytes]) -> list[Walk]:
    """Texts gone through to their ends; those that `failed` are to be followed otherwise."""
    found = Known(model, texts)
    found.run()
    return found.walks


class Rows:
    """Trees in a cache, read side by side."""

    def __init__(self, reader: Reader, count: int, least: int = 1):
        self.reader, self.count, self.least = reader, count, least
        self.places = Places()
        self.cache = cache_of(reader.model.config, self.places)
        self.few = "logits_to_keep" in inspect.signature(reader.model.forward).parameters

    def read(
        self, pieces: Sequence[Piece], tokens: np.ndarray, depths: np.ndarray, columns: np.ndarray, kept: np.ndarray
    ) -> torch.Tensor:
        """Logits `[kept, vocabulary]` of tokens that stand side by side, of those at the places `kept`."""
        device = self.reader.device
        width = max(self.least, *(piece.seen.shape[1] for piece in pieces))
        packed = blocks_of(pieces, self.reader.dtype, device)
        trees = np.repeat([piece.tree for piece in pieces], [piece.end - piece.begin for piece in pieces])
        self.places.pack(packed, self.count, width, *(torch.from_numpy(each).to(device) for each in (trees, columns)))
        given: dict[str, Any] = {
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=self.reader.dtype),
            "position_ids": torch.from_numpy(depths)[None],
            "past_key_values": self.cache,
        }
        wanted = torch.from_numpy(kept).to(device)
        if self.few and len(kept) < len(tokens):
            given["logits_to_keep"] = wanted
        with packing(self.reader.model):
            logits = self.reader.forward(torch.from_numpy(tokens)[None], use_cache=True, **given)[0]
        return logits if len(logits) == len(kept) else logits[wanted]

    @torch.inference_mode()
    def keep(self, kept: Sequence[tuple[int, np.ndarray]]) -> None:
        """Of trees only these columns, rising; those that stay where they are, as most do, are not touched."""
        moved = [np.flatnonzero(columns != np.arange(len(columns))) for _, columns in kept]
        if not any(map(len, moved)):
            return
        trees = np.repeat([tree for tree, _ in kept], [len(places) for places in moved])
        columns = np.concatenate([each[places] for (_, each), places in zip(kept, moved, strict=True)])
        every = [reading for layer in self.cache.layers for reading in readings(layer)]
        layers = [layer for layer in every if isinstance(layer, Columns)]
        tables = (trees, columns, np.concatenate(moved))
        move(layers, *(torch.from_numpy(each).to(self.reader.device) for each in tables))


class Known:
    """Texts that are scored at the same time."""

    def __init__(self, model: ByteModel, texts: Sequence[bytes]):
        self.model, self.reader = model, model.reader
        made = kernels()
        assert made is not None
        self.kernels = made
        self.rows = Rows(self.reader, TREES * len(texts) + 1, min(COLUMNS, max(map(len, texts)) // 2))
        self.tries = Tries(self.reader)
        told = self._starts()
        self.walks = [Walk(model, self.tries, text, told) for text in texts]
        written = np.zeros(self.reader.size, bool)
        written[[*self.reader.later.ids, *self.reader.ends]] = True
        self.unwritten = torch.from_numpy(np.flatnonzero(~written)).to(self.reader.device)

    @torch.inference_mode()
    def _starts(self) -> Told:
        """The start in every tree."""
        count = self.rows.count
        pieces = [Piece(row, row + 1, row, np.ones((1, 1), bool)) for row in range(count)]
        zeros = np.zeros(count, np.int64)
        logits = self.rows.read(
            pieces, np.full(count, self.reader.start, np.int64), zeros, zeros, np.zeros(1, np.int64)
        )
        return self.reader.told(logits, first=True)[0]

    def run(self) -> None:
        """To the end of all texts."""
        while True:
            going = [number for number, walk in enumerate(self.walks) if not walk.done]
            if not going:
                return
            rest = {number: self.walks[number].rest for number in going}
            for number in going:  # those that are behind dare more, so that they are not left to passes of their own
                behind = rest[number] * len(going) >= sum(rest.values())
                self.walks[number].reals[at.SURE] = BEHIND if behind else AHEAD
            ahead = min(MOST, max(LEAST, TOKENS // len(going)))
            self._pass(going, 2 * ahead)
            self._forget(going)
            for number in going:
                self.walks[number].go_on(ahead)

    def _forget(self, going: Sequence[int]) -> None:
        kept = [
            (self._tree(number, tree), columns)
            for number in going
            for tree, columns in enumerate(self.walks[number].forget() or ())
        ]
        self.rows.keep(kept)

    def _tree(self, number: int, tree: int) -> int:
        """The row of one of a text's trees: the first ones of all texts stand side by side."""
        return tree * len(self.walks) + number

    def _pass(self, going: Sequence[int], ahead: int) -> None:
        """Read what texts want, and what comes behind tokens alone."""
        alone = sorted(
            {int(token) for number in going for token in self.walks[number].alone() if not self.tries.logs[token]}
        )
        parts: list[tuple[int, int, np.ndarray]] = []  # text, tree, nodes
        for number in going:
            walk = self.walks[number]
            nodes = walk.wanted(ahead)
            trees = walk.nodes[at.TREE, nodes]
            parts += [(number, tree, nodes[trees == tree]) for tree in range(TREES) if (trees == tree).any()]
        parts.sort(key=lambda part: self._tree(*part[:2]))  # as attention takes them
        self._alone(alone)
        most = max(1, LOGITS // self.reader.size)
        batch: list[tuple[int, int, np.ndarray]] = []
        size = 0
        for number, tree, nodes in parts:
            begin = 0
            while begin < len(nodes):
                some = nodes[begin : begin + most - size]
                batch.append((number, tree, some))
                size += len(some)
                begin += len(some)
                if size == most:
                    self._read(batch)
                    batch, size = [], 0
        if batch:
            self._read(batch)

    @torch.inference_mode()
    def _read(self, parts: Sequence[tuple[int, int, np.ndarray]]) -> None:
        pieces, begin = [], 0
        gathered: list[np.ndarray] = []
        silent: list[np.ndarray] = []
        for number, tree, nodes in parts:
            walk = self.walks[number]
            width = 1 + int(walk.nodes[at.COLUMN, nodes].max())
            seen = np.zeros((len(nodes), width), bool)
            self.kernels["seen"](walk.pointer, address(nodes), len(nodes), width, address(seen))
            pieces.append(Piece(begin, begin + len(nodes), self._tree(number, tree), seen))
            gathered.append(walk.nodes[:, nodes][[at.TOKEN, at.DEPTH, at.COLUMN]])
            silent.append(walk.nodes[at.ASKED, nodes] == at.SILENT)
            begin += len(nodes)
        tokens, depths, columns = np.concatenate(gathered, 1)
        quiet = np.concatenate(silent)
        kept = np.flatnonzero(~quiet)
        if not len(kept):
            kept = np.zeros(1, np.int64)
        logits = self.rows.read(pieces, tokens, depths, columns, kept)
        logits, shares, norms = self._shares(logits)
        begin = 0
        for (number, _, nodes), own in zip(parts, silent, strict=True):
            loud = nodes[~own]
            part = slice(begin, begin + len(loud))
            self.walks[number].told(loud, logits[part], shares[part], norms[part])
            begin += len(loud)

    def _shares(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `[n, vocabulary] float32`, the probabilities of the tokens that write text or the end, and the logs
        of what these were divided by `[n]`; so many at once as stay in the caches of the cores."""
        step = max(1, AT_ONCE * torch.get_num_threads() // logits.shape[1])
        logits = logits.float().contiguous()
        shares, norms = torch.empty_like(logits), logits.new_empty(len(logits))
        for part, share, norm in zip(*(each.split(step) for each in (logits, shares, norms)), strict=True):
            part.index_fill_(-1, self.unwritten, -torch.inf)
            torch.softmax(part, -1, out=share)
            # the likeliest token's logit and probability tell what all were divided by
            torch.sub(part.amax(-1), share.amax(-1).log_(), out=norm)
        return logits.cpu(), shares.cpu(), norms.cpu()

    @torch.inference_mode()
    def _alone(self, tokens: Sequence[int]) -> None:
        """What comes behind tokens where nothing but the start stands before them."""
        most = max(1, min(512, LOGITS // self.reader.size))
        for begin in range(0, len(tokens), most):
            part = np.array(tokens[begin : begin + most], np.int64)
            count = len(part)
            seen = np.eye(count, count + 1, 1, dtype=bool)
            seen[:, 0] = True
            piece = Piece(0, count, self.rows.count - 1, seen)
            logits = self.rows.read([piece], part, np.ones(count, np.int64), 1 + np.arange(count), np.arange(count))
            self.reader.learn(dict(zip(part.tolist(), self.reader.told(logits), strict=True)))
        if len(tokens):
            self.tries.learn()
