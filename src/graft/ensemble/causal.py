"""An ensemble that is a `transformers` causal LM: it loads, scores, generates and saves like any other.

Each member gets a view of its own span of layers of the common cache. Reordering for beams, cropping and repeating act
on the whole cache and are therefore right for every member without further code.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from graft.ensemble.base import Ensemble
from graft.ensemble.caches import CacheView
from graft.ensemble.configuration import EnsembleConfig
from graft.ensemble.gate import features
from graft.ensemble.speculative import Speculated, speculate
from graft.ensemble.union import Union
from graft.errors import RequestError


class EnsembleForCausalLM(Ensemble, GenerationMixin):
    """Members whose log-probabilities are combined at every token by a rule of this folder.

    `logits` are normalised log-probabilities in float32: [batch, length, vocabulary].
    """

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """Every member makes its own mask from the plain one."""
        return attention_mask

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As of any `transformers` model. Raises RequestError where a row of the batch is all padding."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask.any(-1).all():
            rows = (~mask.any(-1)).nonzero().flatten().tolist()
            raise RequestError(
                f"expected a token in every prompt, found none in rows {rows}: begin them with bos_token"
            )
        if self.union is not None:
            kwargs["use_cache"] = False
        return super().generate(inputs, **kwargs)  # type: ignore[misc]

    def speculate(self, input_ids: torch.Tensor, draft: str | None = None, **options: Any) -> Speculated:
        """What `generate` gives, faster where a member's drafts are often kept; options as of `speculative.speculate`.

        Raises RequestError where neither `draft` nor the ensemble's recipe names the member that drafts.
        """
        name = draft or self.config.draft
        if name is None:
            raise RequestError("expected the member that drafts (draft=NAME, or `draft:` in the recipe), found none")
        return speculate(self, input_ids, name, **options)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Combined log-probabilities `[batch, length, vocabulary]`; with `labels` also their mean cross entropy.

        Raises RequestError for an empty prompt and for a context longer than a member's; RunError naming the member
        whose logits are NaN.
        """
        if use_cache and past_key_values is None and self.union is None:
            past_key_values = DynamicCache(config=self.config)
        self._check_inputs(input_ids, past_key_values)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        log_probs = [self._member(place, input_ids, given, past_key_values) for place in self.active]
        weights = self.weights if self.gate is None else self.gate(features(log_probs))
        mixed = self.combine(log_probs, weights, self.options)
        self._check_outputs(mixed, log_probs, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=mixed, labels=labels, vocab_size=mixed.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=mixed, past_key_values=past_key_values)

    def _member(self, place: int, input_ids: torch.Tensor, given: dict[str, Any], cache: Cache | None) -> torch.Tensor:
        """A member's log-probabilities on the ensemble's device, through its view of the cache."""
        if self.union is not None:
            return self._member_of_union(self.union, place, input_ids, given)
        takes, member = self.takes[place], self.members[place]
        device = next(member.parameters()).device
        inputs = {name: _to(value, device) for name, value in given.items() if name in takes and value is not None}
        inputs["past_key_values"] = None if cache is None else CacheView(cache, *self.spans[place])
        logits = member(input_ids=input_ids.to(device), use_cache=cache is not None, **inputs).logits
        keep = given["logits_to_keep"]
        if "logits_to_keep" not in takes and not (isinstance(keep, int) and keep == 0):
            logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        own = logits.shape[-1] == self.config.vocab_size
        if own and isinstance(member, EnsembleForCausalLM):
            return logits.to(self.device)
        # a vocabulary padded to a round size has rows that no token uses: they are no part of the distribution
        return (logits if own else logits[..., : self.config.vocab_size]).float().log_softmax(-1).to(self.device)

    def _member_of_union(
        self, union: Union, place: int, input_ids: torch.Tensor, given: dict[str, Any]
    ) -> torch.Tensor:
        """The same where members cut text differently: read whole, looked at where the union's tokens end."""
        member = self.members[place]
        ids, mask, ends = union.cut(place, input_ids, given["attention_mask"])
        limit = self.limits[place]
        if limit is not None and ids.shape[1] > limit:
            raise RequestError(
                f"member {self.config.members[place]['name']!r} was made for {limit} tokens, found a context of "
                f"{ids.shape[1]} of its own: shorten it"
            )
        device = next(member.parameters()).device
        logits = member(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        keep = given["logits_to_keep"]
        ends = ends[:, keep] if isinstance(keep, torch.Tensor) else ends[:, -keep:]
        rows = torch.arange(len(ends), device=device)[:, None]
        return union.spread(logits[rows, ends.to(device)], place).to(self.device)

    def _check_inputs(self, input_ids: torch.Tensor, cache: Cache | None) -> None:
        length = input_ids.shape[-1]
        if length == 0:
            raise RequestError("expected a token in every prompt, found none: begin it with bos_token")
        total = length + (int(cache.get_seq_length()) if cache is not None else 0)
        for place in self.active:
            limit = self.limits[place]
            if limit is not None and total > limit:
                name = self.config.members[place]["name"]
                raise RequestError(
                    f"member {name!r} was made for {limit} tokens, found a context of {total}: shorten it"
                )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)
