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

from graft.ensemble import agreed, linear
from graft.ensemble.base import Ensemble, log_probs_of, to_device
from graft.ensemble.caches import CacheView, Text, grown_text
from graft.ensemble.configuration import EnsembleConfig
from graft.ensemble.gate import Told, last_state
from graft.ensemble.members import device_of, nan_words
from graft.ensemble.outputs import chosen_outputs
from graft.ensemble.possible import Watched
from graft.ensemble.speculative import Speculated, instead_of_generate, speculate
from graft.ensemble.union import Union
from graft.errors import RunError
from graft.evaluate.reading import log_probs_of_wanted


class EnsembleForCausalLM(Ensemble, Watched, GenerationMixin):
    """Members whose log-probabilities are combined at every token by a rule of this folder.

    `logits` are normalised log-probabilities in float32: [batch, length, vocabulary].
    """

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """Every member makes its own mask from the plain one."""
        return attention_mask

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As of any `transformers` model. Raises RequestError where a row of the batch is all padding, and RunError
        where the options forbid every token that the rule leaves possible.

        An ensemble that names a `draft` speculates where plain greedy decoding is asked for: the same tokens, sooner. A
        union with `boundaries` then combines its members only at common ends of tokens (`agreed.py`).
        """
        self._check_prompts(kwargs.get("attention_mask"))
        if self.choose is not None:
            return chosen_outputs(self, inputs if inputs is not None else kwargs.pop("input_ids"), **kwargs)
        if self.config.draft is not None and (found := instead_of_generate(self, inputs, kwargs)) is not None:
            return found
        if (
            self.config.boundaries is not None
            and (found := agreed.instead_of_generate(self, inputs, kwargs)) is not None
        ):
            return found
        if not self.caches:
            kwargs["use_cache"] = False
        return super().generate(inputs, **kwargs)  # type: ignore[misc]

    def speculate(self, input_ids: torch.Tensor, draft: str | None = None, **options: Any) -> Speculated:
        """What `generate` gives, faster where members' drafts are often kept; options as of `speculative.speculate`.

        `draft` None: the member that the ensemble's recipe names, or any that it pays to begin with.
        """
        return speculate(self, input_ids, draft or self.config.draft, **options)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Combined log-probabilities `[batch, length, vocabulary]`; with `labels` also their mean cross entropy.

        Raises RequestError for an empty prompt and for a context longer than a member's; RunError naming the member
        whose logits are NaN.
        """
        self._check_asked(kwargs)
        if use_cache and past_key_values is None and self.caches:
            past_key_values = DynamicCache(config=self.config)
        self._check_inputs(input_ids, past_key_values, positions=position_ids)
        assert input_ids is not None
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        cache = past_key_values if self.caches else None
        mixed = self.mixed(*self.told(input_ids, given, cache), attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=mixed, labels=labels, vocab_size=mixed.shape[-1], **kwargs)
        found = CausalLMOutputWithPast(loss=loss, logits=mixed, past_key_values=past_key_values)
        return found.to_tuple() if return_dict is False else found

    @torch.no_grad()
    def log_probs_of(self, input_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
        """log Σ λᵢ pᵢ(wanted) `[batch, length]` of one `wanted` token at each place, from what each member says of that
        token alone; None where more is needed: other rules, a gate, a union.

        Raises as `forward`, padding behind a text included.
        """
        if self.combine is not linear.combine or self.gate is not None or self.union is not None:
            return None
        self._check_inputs(input_ids, None)
        every = self._each(range(len(self.active)), lambda number: self._wanted(number, input_ids, wanted))
        return (torch.stack(every, -1) + self.weights.log().to(self.device)).logsumexp(-1)

    def _wanted(self, number: int, input_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """What an active member says of the wanted tokens `[batch, length]`."""
        place = self.active[number]
        member, device = self.members[place], device_of(self.members[place])
        ids, tokens, found = input_ids.to(device), wanted.to(device), None
        if isinstance(member, EnsembleForCausalLM):
            found = member.log_probs_of(ids, tokens)
        if found is None:
            logits = member(input_ids=ids, use_cache=False).logits[..., : self.config.vocab_size]
            found = log_probs_of_wanted(logits, tokens)
        if bool(found.isnan().any()):
            raise RunError(nan_words(self.config.members[place]))
        return found.to(self.device)

    def told(
        self, input_ids: torch.Tensor, given: dict[str, Any], cache: Cache | None, *, every: bool = False
    ) -> tuple[list[Told | None], torch.Tensor]:
        """What each active member says (None where the gate needs none; with `every` never) and the weights.

        `weights [members]`, or `[batch, length, members]` of a gate. A member that is not run reads what it has missed
        when it is needed again, so that what it says then is what it would have said.
        """
        keeps = self.gate is not None and self.gate.skips and cache is not None
        text = grown_text(cache, input_ids, given["position_ids"]) if keeps and cache is not None else None
        return self._told(
            lambda number: self._read(number, input_ids, given, cache, text), given["attention_mask"], every=every
        )

    def _read(
        self, number: int, input_ids: torch.Tensor, given: dict[str, Any], cache: Cache | None, text: Text | None
    ) -> Told:
        """What an active member says, with what it has missed read first where there is a `text`."""
        place, gate = self.active[number], self.gate
        states = gate is not None and gate.states and number in gate.looks_at
        if text is None or cache is None:
            return self._asked(place, input_ids, given, cache, states)
        seen = int(cache.get_seq_length(self.spans[place][0]))
        missed = text.ids.shape[1] - input_ids.shape[1] - seen
        if not missed:
            return self._asked(place, input_ids, given, cache, states)
        ids, positions = text.since(seen)
        keep = given["logits_to_keep"]
        keep = keep + missed if isinstance(keep, torch.Tensor) else keep or input_ids.shape[1]
        return self._asked(place, ids, {**given, "position_ids": positions, "logits_to_keep": keep}, cache, states)

    def _asked(
        self, place: int, input_ids: torch.Tensor, given: dict[str, Any], cache: Cache | None, states: bool = False
    ) -> Told:
        """What a member says, through its view of the cache, on the ensemble's device; with the last hidden state where
        `states` are wanted."""
        if self.union is not None:
            return Told(self._member_of_union(self.union, place, input_ids, given))
        takes, member = self.takes[place], self.members[place]
        device = device_of(member)
        inputs = {
            name: to_device(value, device) for name, value in given.items() if name in takes and value is not None
        }
        if cache is not None:
            inputs["past_key_values"] = view = CacheView(cache, *self.spans[place])
            if "attention_mask" in inputs and not isinstance(member, EnsembleForCausalLM):
                inputs["attention_mask"] = view.mask(inputs["attention_mask"])
        if states:
            inputs["output_hidden_states"] = True
        found = member(input_ids=input_ids.to(device), use_cache=cache is not None, **inputs)
        keep = given["logits_to_keep"]
        logits = found.logits if "logits_to_keep" in takes else _kept(found.logits, keep)
        state = _kept(last_state(found, self.config.members[place]["name"]), keep).to(self.device) if states else None
        own = logits.shape[-1] == self.config.vocab_size
        if own and isinstance(member, EnsembleForCausalLM):
            return Told(logits.to(self.device), state)
        # a vocabulary padded to a round size has rows that no token uses: they are no part of the distribution
        logits = logits if own else logits[..., : self.config.vocab_size]
        return Told(log_probs_of(logits).to(self.device), state)

    def _member_of_union(
        self, union: Union, place: int, input_ids: torch.Tensor, given: dict[str, Any]
    ) -> torch.Tensor:
        """A member's log-probabilities where members cut text differently: read whole, looked at where tokens of the
        union end."""
        member = self.members[place]
        ids, mask, ends = union.cut(place, input_ids, given["attention_mask"])
        device = device_of(member)
        logits = _in_windows(member, ids.to(device), mask.to(device), self.limits[place])
        keep = given["logits_to_keep"]
        ends = ends[:, keep] if isinstance(keep, torch.Tensor) else ends[:, -keep:]
        rows = torch.arange(len(ends), device=device)[:, None]
        return union.spread(logits[rows, ends.to(device)], place).to(self.device)


def _in_windows(member: Any, ids: torch.Tensor, mask: torch.Tensor, limit: int | None) -> torch.Tensor:
    """A member's logits at all places `[batch, length]`, padded behind; of more than it was made for, in windows that
    overlap by half."""
    length = ids.shape[1]
    found = member(input_ids=ids[:, :limit], attention_mask=mask[:, :limit], use_cache=False).logits
    while found.shape[1] < length:
        end = min(length, found.shape[1] + max(1, (limit or length) // 2))
        window = slice(end - (limit or length), end)
        more = member(input_ids=ids[:, window], attention_mask=mask[:, window], use_cache=False).logits
        found = torch.cat([found, more[:, found.shape[1] - end :]], 1)
    return found


def _kept(values: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The places `[batch, length, …]` that `logits_to_keep` names; 0: all."""
    if isinstance(keep, torch.Tensor):
        return values[:, keep.to(values.device)]
    return values[:, -keep:] if keep else values


AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)
