"""Token sequences that share what they begin with, read by one model with one cache: a tree whose nodes see only what
leads to them.

All sequences lie in one row of the cache. A new token is one more column of it, and a mask shows it its ancestors, so
that sequences fork without copying keys and values, and those that nobody holds any more are cut out now and then.
Whether a model honours such masks and positions is tried on itself; one that does not reads every sequence whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graft.ensemble.byte_level.cover import END, Told
from graft.ensemble.byte_level.leaf import Leaf
from graft.ensemble.byte_level.spelling import Spelling
from graft.ensemble.byte_level.trie import Trie
from graft.errors import CannotCombine, RunError
from graft.evaluate.limits import can_branch, least_window

LOGITS = 2**24
"""Logits that are held at once."""
KEPT = 2**25
"""Log-probabilities of what comes behind single tokens that are kept."""


class Reader:
    """A model that tells what comes behind token sequences, its tokens in the order of their bytes.

    `limit`: tokens that the model can read; a longer sequence goes on from its newest half. Raises CannotCombine for a
    vocabulary of which the model has no token.
    """

    def __init__(self, model: Any, spelling: Spelling, *, limit: int | None = None, name: str = "the model"):
        self.model, self.name, self.limit, self.spelling = model, name, limit, spelling
        size = int(model.config.vocab_size)
        later = [each if i < size else None for i, each in enumerate(spelling.later)]
        first = [each if i < size else None for i, each in enumerate(spelling.first)]
        self.later = Trie(later)
        self.first = self.later if first == later else Trie(first)
        if not len(self.later.ids):
            raise CannotCombine(f"{name} has no token that writes text")
        self.start, self.ends = spelling.start, [i for i in spelling.ends if i < size]
        self._style: str | None = None
        self._alone: dict[int, Told] = {}
        self._parts: dict[int, list[int]] = {}
        self.forwards, self.tokens_read = 0, 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def style(self) -> str:
        """How it takes masks: `bool`, `additive`, or `plain` where it does not honour them."""
        if self._style is None:
            self._style = self._tried()
        return self._style

    def _tried(self) -> str:
        if not can_branch(self.model) or least_window(self.model.config) is not None:
            return "plain"
        known = [int(i) for i in self.later.ids[: max(1, len(self.later.ids)) : max(1, len(self.later.ids) // 4)]][:4]
        paths = [known[::-1], known[:2] * 2, known[1:] + known[:1]]
        if self.limit is not None:
            paths = [path[: self.limit - 1] for path in paths]
        wanted = [self.whole([self.start, *path])[-1] for path in paths]
        for style in ("bool", "additive"):
            self._style = style
            try:
                found = self._as_tree(paths)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, RunError):
                continue
            scale = 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 0.1
            if all(_close(a, b, scale) for a, b in zip(found, wanted, strict=True)):
                return style
        return "plain"

    def _as_tree(self, paths: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        forest = Forest(self)
        leaf = [forest.root()[0]] * len(paths)
        last: list[torch.Tensor] = [torch.empty(0)] * len(paths)
        for step in range(max(map(len, paths))):
            rows = [place for place, path in enumerate(paths) if step < len(path)]
            new = [Leaf(leaf[place], paths[place][step], np.zeros(0, np.int64)) for place in rows]
            logits = forest.branches(new)
            for place, made, row in zip(rows, new, logits, strict=True):
                leaf[place], last[place] = made, row
        return last

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

    def guess(self, token: int, instead: Told) -> tuple[Told, bool]:
        """What comes behind a token alone if that is known, and whether it is."""
        found = self._alone.get(token)
        return (instead, False) if found is None else (found, True)

    @torch.inference_mode()
    def alone(self, tokens: Sequence[int]) -> list[Told]:
        """What comes behind each token where nothing but the start stands before it; kept for the next time."""
        if len(self._alone) * len(self.later.ids) > KEPT:
            self._alone.clear()
        new = [token for token in dict.fromkeys(tokens) if token not in self._alone]
        if new:
            ids = torch.tensor([[self.start, token] for token in new])
            self._alone |= zip(new, self.told(self.forward(ids)[:, -1]), strict=True)
        return [self._alone[token] for token in tokens]

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
        order = torch.as_tensor(trie.ids, device=logits.device)
        kept = logits.index_select(-1, order).float()
        if self.ends:
            kept = torch.cat([kept, logits[:, self.ends].float().logsumexp(-1, keepdim=True)], -1)
        logs = kept.log_softmax(-1).cpu().numpy()
        root = np.zeros((len(logs), END + 1))
        plain = logs[:, : len(trie.ids)]
        if len(trie.root.starts):
            behind = np.exp(plain[:, trie.root.own :], dtype=np.float64)
            root[:, trie.root.bytes] = np.add.reduceat(behind, trie.root.starts, axis=1)
        if self.ends:
            root[:, END] = np.exp(logs[:, -1], dtype=np.float64)
        return [Told(trie, own.copy(), sums) for own, sums in zip(plain, root, strict=True)]


class Forest:
    """Sequences that a reader has read."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self._layers: Any = None
        self._columns = 0
        self._alive: weakref.WeakSet[Leaf] = weakref.WeakSet()
        self._known: weakref.WeakValueDictionary[tuple[int, int], Leaf] = weakref.WeakValueDictionary()
        self._root: tuple[Leaf, Told] | None = None

    def root(self) -> tuple[Leaf, Told]:
        """The start of every sequence: before any token."""
        if self._root is None:
            leaf = Leaf(None, self.reader.start, np.zeros(0, np.int64))
            self._root = leaf, self._tell([leaf], first=True)[0]
        return self._root

    def find(self, parent: Leaf, token: int) -> tuple[Leaf, Told] | None:
        """What is known of a token behind a leaf, or None."""
        parent = parent.now if self.recall(parent) else parent
        leaf = self._known.get((id(parent.again or parent), token))
        told = leaf.told() if leaf is not None and leaf.told is not None else None
        return (leaf, told) if leaf is not None and told is not None else None

    def recall(self, leaf: Leaf) -> bool:
        """Whether it is known what comes behind a leaf, which may have been read since it was left out."""
        if not leaf.read and leaf.twin is None and leaf.parent is not None:
            leaf.twin = self.find(leaf.parent, leaf.token)
        return leaf.read or leaf.twin is not None

    @torch.inference_mode()
    def read(self, wanted: Sequence[tuple[Leaf, int]]) -> list[tuple[Leaf, Told]]:
        """The leaf of each wanted token behind its leaf, and what follows it: all that are new in one go."""
        places = [(self._with_room(parent), token) for parent, token in wanted]
        new: dict[tuple[int, int], Leaf] = {}
        for parent, token in places:
            key = (id(parent), token)
            if key not in new and self.find(parent, token) is None:
                new[key] = Leaf(parent, token, np.zeros(0, np.int64))
        made = dict(zip(new, self._tell(list(new.values())), strict=True)) if new else {}
        self._known.update(new)
        found = []
        for parent, token in places:
            key = (id(parent), token)
            found.append((new[key], made[key]) if key in new else self._kept(parent, token))
        return found

    def _kept(self, parent: Leaf, token: int) -> tuple[Leaf, Told]:
        found = self.find(parent, token)
        assert found is not None
        return found

    @torch.inference_mode()
    def chain(self, parent: Leaf, tokens: Sequence[int]) -> list[tuple[Leaf, Told]]:
        """The leaves of tokens one behind the other, read in one go; stops where the model can read no further."""
        found: list[tuple[Leaf, Told]] = []
        limit = self.reader.limit
        tokens = list(tokens if limit is None else tokens[: max(0, limit - 1 - parent.depth)])
        while tokens and (known := self.find(parent, tokens[0])):
            found.append(known)
            parent = known[0]
            tokens.pop(0)
        new: list[Leaf] = []
        for token in tokens:
            new.append(Leaf(new[-1] if new else parent, token, np.zeros(0, np.int64)))
        if new:
            found += zip(new, self._tell(new), strict=True)
            self._known.update({(id(leaf.parent), leaf.token): leaf for leaf in new})
        return found

    @torch.inference_mode()
    def catch_up(self, unread: Sequence[Leaf]) -> list[tuple[Leaf, Told]]:
        """Read sequences that were not read, and what they stand behind, in one go; their `twin` says what they are.

        What the model has no room for is left as it is.
        """
        new: dict[int, tuple[Leaf, Leaf]] = {}
        for leaf in unread:
            self._place(leaf, new)
        told = self._tell([made for _, made in new.values()]) if new else []
        for (leaf, made), each in zip(new.values(), told, strict=True):
            above = made.parent.told() if made.parent is not None and made.parent.told is not None else None
            known = above is not None and made.parent is not None and leaf.true == -np.inf
            made.true = made.parent.true + above.log(leaf.token) if known else leaf.true  # type: ignore[union-attr]
            leaf.twin = made, each
            self._known[id(made.parent), made.token] = made
        return [leaf.twin for leaf, _ in new.values() if leaf.twin is not None]

    def _place(self, leaf: Leaf, new: dict[int, tuple[Leaf, Leaf]]) -> Leaf | None:
        """The leaf itself where it is read, else a new one that is read with those in `new`."""
        if leaf.read or leaf.twin is not None:
            return leaf if leaf.twin is None else leaf.twin[0]
        if id(leaf) in new:
            return new[id(leaf)][1]
        assert leaf.parent is not None
        parent = self._place(leaf.parent, new)
        if parent is None:
            return None
        if parent.told is not None:
            parent = self._with_room(parent)
        if self.reader.limit is not None and parent.depth + 1 >= self.reader.limit:
            return None
        leaf.twin = self.find(parent, leaf.token)
        if leaf.twin is None:
            new[id(leaf)] = leaf, Leaf(parent, leaf.token, np.zeros(0, np.int64))
        return leaf.twin[0] if leaf.twin is not None else new[id(leaf)][1]

    def _with_room(self, leaf: Leaf) -> Leaf:
        """The leaf, or where the model can read no further the same with only its newest tokens before it."""
        limit = self.reader.limit
        if limit is None or leaf.depth + 1 < limit:
            return leaf
        if leaf.again is None:
            above, tokens = self.root()[0], leaf.path(max(1, limit // 2))
            while tokens and (known := self._known.get((id(above), tokens[0]))) is not None:
                above = known
                tokens.pop(0)
            leaf.again = self.chain(above, tokens)[-1][0] if tokens else above
        return leaf.again

    @torch.inference_mode()
    def _tell(self, leaves: list[Leaf], first: bool = False) -> list[Told]:
        """What follows new leaves, each behind a known one or one before it in the list."""
        size = max(1, LOGITS // max(1, int(self.reader.model.config.vocab_size)))
        told: list[Told] = []
        for begin in range(0, len(leaves), size):
            part = leaves[begin : begin + size]
            logits = self._plain(part) if self.reader.style == "plain" else self.branches(part)
            told += self.reader.told(logits, first)
        for leaf, each in zip(leaves, told, strict=True):
            leaf.told = weakref.ref(each)
        return told

    def _plain(self, leaves: list[Leaf]) -> torch.Tensor:
        """Logits `[leaves, vocabulary]`, every sequence read whole; those that lead to another are read with it."""
        inner = {id(leaf.parent) for leaf in leaves}
        tips = [leaf for leaf in leaves if id(leaf) not in inner]
        paths = [[self.reader.start, *tip.path()] for tip in tips]
        longest = max(map(len, paths))
        ids = torch.tensor([path + [self.reader.start] * (longest - len(path)) for path in paths])
        logits = self.reader.forward(ids)
        places = {}
        for row, tip in enumerate(tips):
            leaf: Leaf | None = tip
            while leaf is not None:
                places[id(leaf)] = (row, leaf.depth)
                leaf = leaf.parent
        rows, depths = zip(*(places[id(leaf)] for leaf in leaves), strict=True)
        return logits[list(rows), list(depths)]

    @torch.inference_mode()
    def branches(self, leaves: list[Leaf]) -> torch.Tensor:
        """Logits `[leaves, vocabulary]` of new leaves, which become columns of the cache."""
        from transformers import DynamicCache

        self._compact()
        before = self._columns
        for place, leaf in enumerate(leaves):
            above = leaf.parent.slots if leaf.parent is not None else np.zeros(0, np.int64)
            leaf.slots = np.append(above, before + place)
        self._layers = DynamicCache(config=self.reader.model.config) if self._layers is None else self._layers
        ids = torch.tensor([[leaf.token for leaf in leaves]])
        given: dict[str, Any] = {"past_key_values": self._layers, "use_cache": True}
        total = before + len(leaves)
        if len(leaves[-1].slots) < total:  # else one sequence is all there is
            given["attention_mask"] = self._mask(leaves, total)
            given["position_ids"] = torch.tensor([[leaf.depth for leaf in leaves]])
        logits = self.reader.forward(ids, **given)[0]
        if self._layers.get_seq_length() != total:
            raise RunError(f"{self.reader.name} keeps no cache of its tokens")
        self._columns = total
        self._alive.update(leaves)
        return logits

    def _mask(self, leaves: list[Leaf], total: int) -> torch.Tensor:
        """[1, 1, leaves, columns]: each sees what leads to it."""
        seen = np.zeros((len(leaves), total), bool)
        for place, leaf in enumerate(leaves):
            seen[place, leaf.slots] = True
        mask = torch.from_numpy(seen)[None, None]
        if self.reader.style == "bool":
            return mask
        dtype = next(self.reader.model.parameters()).dtype
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def _compact(self) -> None:
        """Cut out of the cache what no living sequence sees, where that is most of it."""
        if self._columns < 2 * len(self._alive) + 32:
            return
        alive = sorted(self._alive, key=lambda leaf: int(leaf.slots[-1]))
        keep = np.array([leaf.slots[-1] for leaf in alive], np.int64)
        place = np.full(self._columns, -1, np.int64)
        place[keep] = np.arange(len(keep))
        for leaf in alive:
            leaf.slots = place[leaf.slots]
        for layer in self._layers.layers if self._layers is not None else ():
            columns = torch.as_tensor(keep, device=layer.keys.device)
            layer.keys = layer.keys.index_select(2, columns)
            layer.values = layer.values.index_select(2, columns)
        self._columns = len(keep)

    def adopt(self, other: Forest) -> None:
        """Take over the sequences of another forest of the same reader, which is not used any more."""
        if other._layers is not None:
            if self._layers is None:
                self._layers = other._layers
            else:
                for own, new in zip(self._layers.layers, other._layers.layers, strict=True):
                    own.keys = torch.cat([own.keys, new.keys], 2)
                    own.values = torch.cat([own.values, new.values], 2)
        for leaf in other._alive:
            leaf.slots = leaf.slots + self._columns
        self._columns += other._columns
        self._alive.update(other._alive)
        self._known.update(other._known)
        self._root = self._root or other._root


def _close(found: torch.Tensor, wanted: torch.Tensor, scale: float) -> bool:
    a, b = found.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return bool(((a - b).abs() < scale * (1 + b.abs())).all())
