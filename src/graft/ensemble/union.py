"""One vocabulary out of several: the union of the members' token strings, for mixtures.

A token that several members have is mixed; one that a single member has gets what its owner gives. A member reads a
token that it lacks as the tokens it would write that string with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft.errors import CannotCombine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Tokens that are the same by what they are for, however they are spelt."""


@dataclass(frozen=True)
class Side:
    """A member's part: `own [n]` ids of its tokens, `places [n]` where they stand in the union, and, for each token of
    the union, the ids it reads (empty: it cannot)."""

    own: torch.Tensor
    places: torch.Tensor
    reads: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Union:
    """The union's token strings in the order of their ids (the first member's ids stay), and every member's side."""

    tokens: tuple[str, ...]
    sides: tuple[Side, ...]
    tokenizers: tuple[PreTrainedTokenizerFast, ...]
    """The members' own."""

    def shared(self) -> torch.Tensor:
        """Mask `[union]` of the tokens that every member has."""
        count = torch.zeros(len(self.tokens), dtype=torch.long)
        for side in self.sides:
            count[side.places.unique()] += 1
        return count == len(self.sides)

    def spread(self, logits: torch.Tensor, member: int) -> torch.Tensor:
        """A member's logits `[..., its rows]` as log-probabilities `[..., union] float32`; zero for what it lacks."""
        side = self.sides[member]
        told = logits[..., side.own.to(logits.device)].float().log_softmax(-1)
        whole = told.new_full((*told.shape[:-1], len(self.tokens)), -torch.inf)
        # where one logit is NaN all are: also what it lacks, so that this shows at any token
        return whole.index_copy_(-1, side.places.to(told.device), told).masked_fill(told[..., :1].isnan(), torch.nan)

    def cut(
        self, member: int, ids: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A batch `[batch, length]` of union ids in a member's tokens, padded on the right.

        Returns its ids and mask `[batch, own length]`, and `ends [batch, length]`: where each union token ends in them
        (0 for padding). Raises CannotCombine for a token that the member has no way to read.
        """
        reads = self.sides[member].reads
        rows, ends = [], torch.zeros_like(ids, device="cpu")
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :].bool()
        for row, (line, real) in enumerate(zip(ids.tolist(), keep.tolist(), strict=True)):
            own: list[int] = []
            for place, token in enumerate(line):
                if real[place]:
                    own += reads[token] or self._unreadable(member, token)
                    ends[row, place] = len(own) - 1
            rows.append(torch.tensor(own))
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long(), ends

    def _unreadable(self, member: int, token: int) -> tuple[int, ...]:
        raise CannotCombine(
            f"member {member} has neither the token {self.tokens[token]!r} nor tokens to write it with: a union needs "
            "members that can read each other's tokens"
        )


def union_of(tokenizers: Sequence[PreTrainedTokenizerFast]) -> Union:
    """The union of the tokenizers' vocabularies. Raises CannotCombine where equal strings need not mean equal text."""
    _check_alike(tokenizers)
    first = tokenizers[0]
    ids = dict(first.get_vocab())
    names = [_names(tokenizer, first) for tokenizer in tokenizers]
    size = max(ids.values()) + 1
    for known, tokenizer in zip(names, tokenizers, strict=True):
        for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
            size += ids.setdefault(known.get(token, token), size) == size
    tokens = [""] * size
    for token, place in ids.items():
        tokens[place] = token
    sides = [_side(tokenizer, known, ids, tokens) for tokenizer, known in zip(tokenizers, names, strict=True)]
    return Union(tuple(tokens), tuple(sides), tuple(tokenizers))


def _check_alike(tokenizers: Sequence[PreTrainedTokenizerFast]) -> None:
    kinds = [_written(tokenizer) for tokenizer in tokenizers]
    for place, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise CannotCombine(
                f"members 0 and {place} write tokens differently ({kinds[0][0]} and {kind[0]} with their decoders): "
                "their token strings cannot be matched; a union needs tokenizers of one kind"
            )


def _written(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    return raw["model"]["type"], json.dumps(raw["decoder"], sort_keys=True)


def _names(tokenizer: PreTrainedTokenizerFast, first: PreTrainedTokenizerFast) -> dict[str, str]:
    """How the first tokenizer spells this one's special tokens."""
    pairs = ((getattr(tokenizer, role), getattr(first, role)) for role in ROLES)
    return {own: theirs for own, theirs in pairs if own and theirs}


def _side(tokenizer: PreTrainedTokenizerFast, known: dict[str, str], ids: dict[str, int], tokens: list[str]) -> Side:
    vocabulary = tokenizer.get_vocab()
    by_place = {ids[known.get(token, token)]: own for token, own in vocabulary.items()}
    model, unknown = tokenizer.backend_tokenizer.model, tokenizer.unk_token_id
    reads: list[tuple[int, ...]] = []
    for place, token in enumerate(tokens):
        own = (by_place[place],) if place in by_place else tuple(piece.id for piece in model.tokenize(token))
        reads.append(() if place not in by_place and unknown in own else own)
    places = sorted(by_place)
    return Side(torch.tensor([by_place[place] for place in places]), torch.tensor(places), tuple(reads))


def write_tokenizer(union: Union, first: Path, folder: Path) -> None:
    """The first member's tokenizer with the union's other tokens behind its own: it cuts as before and decodes all.

    Raises CannotCombine for a tokenizer whose vocabulary is no table of strings with ids.
    """
    raw: dict[str, Any] = json.loads((first / "tokenizer.json").read_text())
    table = raw["model"].get("vocab")
    if raw["model"]["type"] != "BPE" or not isinstance(table, dict):
        raise CannotCombine(f"a union needs tokenizers of type BPE, found {raw['model']['type']} in {first}")
    known = set(table) | {entry["content"] for entry in raw.get("added_tokens", [])}
    table.update({token: place for place, token in enumerate(union.tokens) if token and token not in known})
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False))


@torch.no_grad()
def unmatched_mass(union: Union, log_probs: Sequence[torch.Tensor]) -> list[float]:
    """Mean probability that each member gives to tokens not all members have: mass that is not mixed but passed on.

    `log_probs`: `[..., union]` of each member.
    """
    shared = union.shared()
    return [float(each.exp()[..., ~shared.to(each.device)].sum(-1).mean()) for each in log_probs]
