"""An ensemble of encoder-decoder models, such as translators: each encodes the source, their predictions are combined.

The members' encodings stand side by side in one tensor, so that what `generate` does to an encoder's output (repeating
it for beams) is right for all of them; each gets a view of its own layers of both caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from graft.ensemble.base import Ensemble
from graft.ensemble.caches import CacheView
from graft.ensemble.configuration import EnsembleConfig
from graft.ensemble.gate import Told, last_state
from graft.errors import RequestError


class Encoders(nn.Module):
    """The active members' encoders; their states side by side: `[batch, length, sum of sizes] float32`."""

    main_input_name = "input_ids"

    def __init__(self, encoders: Sequence[nn.Module]):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> BaseModelOutput:
        """All encodings of `input_ids [batch, length]`."""
        states = [encoder(input_ids=input_ids, attention_mask=attention_mask)[0] for encoder in self.encoders]
        return BaseModelOutput(last_hidden_state=torch.cat([state.float() for state in states], -1))


class EnsembleForSeq2SeqLM(Ensemble, GenerationMixin):
    """Encoder-decoder members whose log-probabilities are combined at every token of the target."""

    def get_encoder(self, modality: str | None = None) -> Encoders:
        """One encoder that is all of them."""
        return Encoders([self.members[place].get_encoder() for place in self.active])  # type: ignore[operator]

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
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """Combined log-probabilities `[batch, target length, vocabulary]`; with `labels` their mean cross entropy."""
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = _shifted(labels, self.config)
        if decoder_input_ids is None:
            raise RequestError("expected decoder_input_ids or labels, found neither")
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        parts = encoder_outputs[0].split(self._sizes(), -1)
        given = {
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        pairs = zip(self.active, parts, strict=True)
        told = [self._translator(place, part, given, past_key_values) for place, part in pairs]
        log_probs = [each.log_probs for each in told]
        weights = self.weights if self.gate is None else self.gate.decide([told[n] for n in self.gate.looks_at])
        mixed = self.combine(log_probs, weights, self.options)
        self._check_outputs(mixed, log_probs, None)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(mixed.flatten(0, 1), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss,
            logits=mixed,
            past_key_values=past_key_values,
            encoder_last_hidden_state=encoder_outputs[0],
        )

    def _sizes(self) -> list[int]:
        """Width of each active member's encoding."""
        members: list[Any] = [self.members[place] for place in self.active]
        return [member.config.hidden_size for member in members]

    def _translator(
        self, place: int, encoding: torch.Tensor, given: dict[str, Any], cache: EncoderDecoderCache | None
    ) -> Told:
        member: Any = self.members[place]
        states = self.gate is not None and self.gate.states
        view = None
        if cache is not None:
            span = self.spans[place]
            view = EncoderDecoderCache(
                CacheView(cache.self_attention_cache, *span), CacheView(cache.cross_attention_cache, *span)
            )
        state = encoding.contiguous().to(member.dtype)
        found = member(
            encoder_outputs=BaseModelOutput(last_hidden_state=state),
            past_key_values=view,
            use_cache=view is not None,
            output_hidden_states=states,
            **given,
        )
        last = last_state(found, self.config.members[place]["name"]) if states else None
        return Told(found.logits[..., : self.config.vocab_size].float().log_softmax(-1), last)


def _shifted(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """The target behind its start token; ignored labels (-100) become padding."""
    start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], 1)


AutoModelForSeq2SeqLM.register(EnsembleConfig, EnsembleForSeq2SeqLM, exist_ok=True)
