"""Writing with members of several vocabularies that are combined only where it can matter.

The first member drafts a block of tokens; the others read the text once with the whole block. They are heard where a
token of every member ends (elsewhere what they expect next is no continuation of the text as the first member cuts it),
and of these places only where they would not have written the same. The first token that the mixture over the union
puts in the place of a draft ends the block (Yun et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graft.ensemble import linear
from graft.ensemble.greedy import behind, pad_of, plain_greedy
from graft.ensemble.members import nan_words
from graft.errors import RequestError, RunError

if TYPE_CHECKING:
    from graft.ensemble.causal import EnsembleForCausalLM
    from graft.ensemble.union import Union


@dataclass(frozen=True)
class Written:
    """`ids [length]` in tokens of the union, prompt included; at how many of the tokens written the members' boundaries
    agreed, and at how many of these they were combined."""

    ids: torch.Tensor
    agreed: int
    combined: int


@torch.no_grad()
def write(
    model: EnsembleForCausalLM,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    block: int = 8,
    eos_token_id: int | Sequence[int] | None = None,
) -> Written:
    """Go on greedily from `input_ids [1, length]`, tokens of the union.

    Raises RequestError for an ensemble that is no union, for a batch, an empty prompt and a `block` below one; RunError
    naming a member whose logits are NaN.
    """
    union, begin = _checked(model, input_ids, block), input_ids.shape[1]
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    text, longest, agreed, combined = input_ids[0].tolist(), begin + max_new_tokens, 0, 0
    while len(text) < longest and (len(text) == begin or text[-1] not in ends):
        drafts, told = _drafted(model, union, text, min(block, longest - len(text)), ends)
        others = _Others(model, union, text + drafts)
        for place, draft in enumerate(drafts):
            heard = others.at(len(text))
            token = draft
            if heard is not None:
                agreed += 1
                if any(int(each.argmax()) != draft for each in heard):
                    combined += 1
                    token = int(linear.combine([told[place], *heard], model.weights, linear.Settings()).argmax())
            text.append(token)
            if token != draft:
                break
    return Written(torch.tensor(text, device=input_ids.device), agreed, combined)


def instead_of_generate(
    model: EnsembleForCausalLM, input_ids: torch.Tensor | None, options: Mapping[str, Any]
) -> torch.Tensor | None:
    """What is written for each row of a batch, where these options of `generate` say greedy decoding; else None."""
    asked = plain_greedy(model, input_ids, options)
    if asked is None:
        return None
    ids, mask = asked["input_ids"], asked["attention_mask"]
    rows = [row[None] if mask is None else row[mask[place].bool()][None] for place, row in enumerate(ids)]
    end = asked["eos_token_id"]
    conduct = {"max_new_tokens": asked["max_new_tokens"], "block": model.config.boundaries, "eos_token_id": end}
    new = [write(model, row, **conduct).ids[row.shape[1] :].tolist() for row in rows]
    ends = [] if end is None else [end] if isinstance(end, int) else end
    return behind(ids, new, pad_of(model, asked["pad_token_id"], ends))


def _checked(model: EnsembleForCausalLM, input_ids: torch.Tensor, block: int) -> Union:
    if model.union is None or 0 not in model.active:
        raise RequestError(
            "expected a union of vocabularies whose first member has a weight: it drafts what is written"
        )
    if len(input_ids) != 1 or not input_ids.shape[1] or block < 1:
        raise RequestError(
            f"expected one prompt with a token and a block of one or more, found {tuple(input_ids.shape)} and {block}"
        )
    return model.union


def _drafted(
    model: EnsembleForCausalLM, union: Union, text: Sequence[int], count: int, ends: Sequence[int]
) -> tuple[list[int], list[torch.Tensor]]:
    """What the first member writes behind the text, and its log-probabilities `[union]` before each token."""
    member: Any = model.members[0]
    own, mask, _ = union.cut(0, torch.tensor([list(text)]), None)
    found = member.generate(
        own.to(member.device),
        attention_mask=mask.to(member.device),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=model.config.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    told = [union.spread(logits[0], 0).to(model.device) for logits in found.logits]
    _check(model, 0, told)
    return found.sequences[0, own.shape[1] :].tolist(), told


class _Others:
    """What all members but the first say of a text, each read once, cut by its own tokenizer."""

    def __init__(self, model: EnsembleForCausalLM, union: Union, text: Sequence[int]):
        words = [union.tokens[token] for token in text]
        self.whole = self._string(union, words)
        before = [self._string(union, words[:end]) for end in range(len(text) + 1)]
        self.starts = [len(each) if self.whole.startswith(each) else -1 for each in before]
        self.told = [self._read(model, union, place, text) for place in model.active if place]

    def _read(
        self, model: EnsembleForCausalLM, union: Union, place: int, text: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """A member's log-probabilities `[union]` of what comes, by the character that one of its tokens ends before."""
        first, own = union.tokenizers[0], union.tokenizers[place]
        special = next((at for at, token in enumerate(text) if token not in first.all_special_ids), len(text))
        begin = [each for token in text[:special] for each in union.sides[place].reads[token]]
        skipped = self.starts[special]
        cut = own(self.whole[skipped:], add_special_tokens=False, return_offsets_mapping=True)
        ends = [*([skipped] if begin else []), *(skipped + end for _, end in cut["offset_mapping"])]
        ids = [*begin, *cut["input_ids"]]
        member: Any = model.members[place]
        logits = member(input_ids=torch.tensor([ids], device=member.device), use_cache=False).logits[0, -len(ends) :]
        told = union.spread(logits, place).to(model.device)
        _check(model, place, [told])
        return dict(zip(ends, told, strict=True))

    @staticmethod
    def _string(union: Union, words: Sequence[str]) -> str:
        return str(union.tokenizers[0].convert_tokens_to_string(list(words))) if words else ""

    def at(self, length: int) -> list[torch.Tensor] | None:
        """What they say behind the first `length` tokens of the first member; None where a token of one does not end
        there."""
        start = self.starts[length]
        return [each[start] for each in self.told] if all(start in each for each in self.told) else None


def _check(model: EnsembleForCausalLM, place: int, told: Sequence[torch.Tensor]) -> None:
    if any(bool(each[..., 0].isnan().any()) for each in told):
        raise RunError(nan_words(model.config.members[place]))
