"""An ensemble of encoder-decoder models, such as translators: each encodes the source, their predictions are combined.

The members' encodings stand side by side in one tensor, so that what `generate` does to an encoder's output (repeating
it for beams) is right for all of them; each gets a view of its own layers of both caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from graft.ensemble.base import Ensemble, log_probs_of, to_device
from graft.ensemble.caches import CacheView, grown_text
from graft.ensemble.configuration import EnsembleConfig
from graft.ensemble.gate import Told, last_state
from graft.ensemble.members import device_of
from graft.ensemble.outputs import chosen_outputs
from graft.ensemble.possible import Watched
from graft.errors import RequestError


class Encoders(nn.Module):
    """The active translators' encoders; their states side by side: `[batch, length, sum of sizes] float32`."""

    main_input_name = "input_ids"

    def __init__(self, encoders: Sequence[nn.Module]):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> BaseModelOutput:
        """All encodings of `input_ids [batch, length]`, on its device."""
        states = []
        for encoder in self.encoders:
            device = next(encoder.parameters()).device
            found = encoder(input_ids=input_ids.to(device), attention_mask=to_device(attention_mask, device))[0]
            states.append(found.float().to(input_ids.device))
        return BaseModelOutput(last_hidden_state=torch.cat(states, -1))


class EnsembleForSeq2SeqLM(Ensemble, Watched, GenerationMixin):
    """Encoder-decoder members whose log-probabilities are combined at every token of the target.

    Beside one translator, decoders may read the target alone (`experts`: domain-differential adaptation).
    """

    @property
    def translators(self) -> list[int]:
        """Places of the active members that read a source."""
        configs = [self.config.members[place]["config"] for place in self.active]
        return [place for place, config in zip(self.active, configs, strict=True) if config.get("is_encoder_decoder")]

    def get_encoder(self, modality: str | None = None) -> Encoders:
        """One encoder that is all of them."""
        return Encoders([self.members[place].get_encoder() for place in self.translators])  # type: ignore[operator]

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As of any `transformers` model. Raises RequestError where a row of the batch is all padding, and for a source
        longer than a member reads; RunError where the options forbid every token that the rule leaves possible."""
        self._check_prompts(kwargs.get("attention_mask"))
        source = inputs if inputs is not None else kwargs.get("input_ids")
        if source is not None:
            self._check_inputs(source, None, self.translators)
        if self.choose is not None:
            return chosen_outputs(self, inputs if inputs is not None else kwargs.pop("input_ids"), **kwargs)
        return super().generate(inputs, **kwargs)  # type: ignore[misc]

    def speculate(self, *_: Any, **__: Any) -> Any:
        """Refused: a draft needs decoders."""
        raise RequestError("speculation needs decoders, found encoder-decoder members: use generate")

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Combined log-probabilities `[batch, target length, vocabulary]`; with `labels` their mean cross entropy, or
        with `num_items_in_batch` its sum over so many labels.

        Raises RequestError for a source or target longer than a member's limit; RunError naming a member that gives
        NaN.
        """
        self._check_asked(kwargs)
        if encoder_outputs is None:
            self._check_inputs(input_ids, None, self.translators)
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = _shifted(labels, self.config)
        if decoder_input_ids is None:
            raise RequestError("expected decoder_input_ids or labels, found neither")
        self._check_inputs(decoder_input_ids, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        given = {
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        reads = self._reader(encoder_outputs[0], given, past_key_values)
        mixed = self.mixed(*self._told(reads, decoder_attention_mask), None)
        loss = None
        if labels is not None:
            loss = fixed_cross_entropy(mixed.flatten(0, 1), labels.flatten(), num_items_in_batch)
        found = Seq2SeqLMOutput(
            loss=loss,
            logits=mixed,
            past_key_values=past_key_values,
            encoder_last_hidden_state=encoder_outputs[0],
        )
        return found.to_tuple() if return_dict is False else found

    def _reader(
        self, encodings: torch.Tensor, given: dict[str, Any], cache: EncoderDecoderCache | None
    ) -> Callable[[int], Told]:
        """How an active member is asked for what it says of the target; `encodings` are the translators' side by side.

        A member that a gate has left out reads first what it has missed.
        """
        members: list[Any] = [self.members[place] for place in self.translators]
        parts = encodings.split([_width(member) for member in members], -1)
        own = dict(zip(self.translators, parts, strict=True))
        ids, text = given["decoder_input_ids"], None
        if self.gate is not None and self.gate.skips and cache is not None:
            text = grown_text(cache.self_attention_cache, ids, None)

        def read(number: int) -> Told:
            place, said = self.active[number], given
            if text is not None and cache is not None:
                seen = int(cache.self_attention_cache.get_seq_length(self.spans[place][0]))
                said = {**given, "decoder_input_ids": text.since(seen)[0]}
            if place not in own:
                return self._language_model(place, said, cache)
            told = self._translator(place, own[place], said, cache)
            return told.last(ids.shape[1])

        return read

    def _translator(
        self, place: int, encoding: torch.Tensor, given: dict[str, Any], cache: EncoderDecoderCache | None
    ) -> Told:
        member: Any = self.members[place]
        view = None
        if cache is not None:
            span = self.spans[place]
            view = EncoderDecoderCache(
                CacheView(cache.self_attention_cache, *span), CacheView(cache.cross_attention_cache, *span)
            )
        device = device_of(member)
        state = encoding.contiguous().to(device, member.dtype)
        found = member(
            encoder_outputs=BaseModelOutput(last_hidden_state=state),
            past_key_values=view,
            use_cache=view is not None,
            output_hidden_states=self._wants_states,
            **{name: to_device(value, device) for name, value in given.items()},
        )
        return self._said(place, found, encoding.device)

    def _language_model(self, place: int, given: dict[str, Any], cache: EncoderDecoderCache | None) -> Told:
        """A decoder reads the target as text of its own, from its own start token."""
        member: Any = self.members[place]
        view = None if cache is None else CacheView(cache.self_attention_cache, *self.spans[place])
        device = device_of(member)
        ids = given["decoder_input_ids"].to(device)
        if view is None or view.get_seq_length() == 0:
            ids = torch.cat([torch.full_like(ids[:, :1], start_token(member.config)), ids[:, 1:]], 1)
        found = member(
            input_ids=ids,
            attention_mask=to_device(given["decoder_attention_mask"], device),
            past_key_values=view,
            use_cache=view is not None,
            output_hidden_states=self._wants_states,
        )
        return self._said(place, found, given["decoder_input_ids"].device)

    @property
    def _wants_states(self) -> bool:
        return self.gate is not None and self.gate.states

    def _said(self, place: int, found: Any, device: torch.device) -> Told:
        last = last_state(found, self.config.members[place]["name"]).to(device) if self._wants_states else None
        return Told(log_probs_of(found.logits[..., : self.config.vocab_size]).to(device), last)


def _width(translator: Any) -> int:
    """Channels of what a translator's encoder gives: an ensemble's are those of its own translators side by side."""
    if isinstance(translator, EnsembleForSeq2SeqLM):
        return sum(_width(translator.members[place]) for place in translator.translators)
    return int(translator.config.hidden_size)


def start_token(config: Any) -> int:
    """What stands before a text that begins from nothing: the start token, or the end token where there is none."""
    for token in (config.bos_token_id, config.eos_token_id):
        if isinstance(token, int):
            return token
    raise RequestError("a decoder beside a translator needs a start or end token, found neither in its configuration")


def _shifted(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """The target behind its start token; ignored labels (-100) become padding."""
    start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], 1)


AutoModelForSeq2SeqLM.register(EnsembleConfig, EnsembleForSeq2SeqLM, exist_ok=True)
