"""An ensemble of causal models with any tokenizers, as a `transformers` model over bytes.

Each member gives exact probabilities of the next byte (`byte_model.py`), which the rule combines. The vocabulary is the
256 bytes and three ids that begin, end and pad texts (`tokenizer.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from graft import models
from graft.ensemble.base import Ensemble
from graft.ensemble.byte_level.byte_model import ByteModel, Cover
from graft.ensemble.byte_level.cache import ByteCache
from graft.ensemble.byte_level.configuration import ByteEnsembleConfig
from graft.ensemble.byte_level.cover import State
from graft.ensemble.byte_level.forest import Forest
from graft.ensemble.byte_level.tokenizer import BOS, EOS, PAD, SIZE, byte_tokenizer
from graft.ensemble.configuration import WORDS, EnsembleConfig, context_of, kind_of
from graft.ensemble.members import home_of
from graft.errors import RequestError


class EnsembleOverBytes(Ensemble, GenerationMixin):
    """Members whose probabilities of the next byte are combined by a rule.

    `logits` are normalised log-probabilities in float32: [batch, length, 259]. Behind an end or a start id a new text
    begins; padding changes nothing, wherever it stands. No gradient flows into the members.
    """

    config_class = ByteEnsembleConfig
    _is_stateful = True
    padding = PAD

    def __init__(
        self,
        config: ByteEnsembleConfig,
        members: Sequence[PreTrainedModel] | None = None,
        tokenizers: Sequence[Any] | None = None,
    ):
        _check_decoders(config)
        super().__init__(config, members)
        self.readers: list[ByteModel] = []
        self.tokenizers: list[Any] = []
        if tokenizers is not None:
            self.read_with(tokenizers)

    def read_with(self, tokenizers: Sequence[Any]) -> None:
        """Take the members' tokenizers. Raises CannotCombine where one's tokens have no bytes of their own."""
        self.tokenizers = list(tokenizers)
        cover = Cover(**self.config.cover)
        self.readers = []
        for place in self.active:
            entry, tokenizer = self.config.members[place], self.tokenizers[place]
            name, limit = f"member {entry['name']!r}", context_of(entry["config"])
            self.readers.append(ByteModel(self.members[place], tokenizer, cover, limit=limit, name=name))

    @classmethod
    def _check_kind(cls, config: EnsembleConfig, folder: Path) -> None:
        """A configuration of its own says it."""
        _check_decoders(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any ensemble; raises RequestError too where a member has no tokenizer."""
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        folder = Path(pretrained_model_name_or_path)
        model.read_with([models.load_tokenizer(home_of(folder / entry["path"])) for entry in model.config.members])
        return found

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, *, self_contained: bool = False, **kwargs: Any
    ) -> None:
        """As of any ensemble, with the tokenizer over bytes; members that are copied have their own beside them."""
        super().save_pretrained(save_directory, self_contained=self_contained, **kwargs)
        byte_tokenizer().save_pretrained(save_directory)
        if self_contained:
            entries = ByteEnsembleConfig.from_pretrained(save_directory).members
            for entry, tokenizer in zip(entries, self.tokenizers, strict=True):
                tokenizer.save_pretrained(Path(save_directory) / entry["path"])

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """The plain mask: it says which ids are padding."""
        return attention_mask

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """A cache of its own kind, unless one is given or none is wanted."""
        if generation_config.cache_implementation is not None:
            raise RequestError(
                f"an ensemble over bytes has a cache of its own, found {generation_config.cache_implementation!r}"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = ByteCache()

    def speculate(self, *_: Any, **__: Any) -> Any:
        """Refused: a draft needs members of one vocabulary."""
        raise RequestError("speculation needs members of one vocabulary, found an ensemble over bytes: use generate")

    @torch.no_grad()
    def byte_probabilities(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: ByteCache | None = None
    ) -> list[np.ndarray]:
        """Of each active member `[batch, length, 257] float64`: the next byte (or the end) behind each id."""
        batch, length = input_ids.shape
        kept = cache if cache is not None else ByteCache()
        if not kept.forests:
            kept.forests = [Forest(reader.reader) for reader in self.readers]
            kept.rows = [()] * batch
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -length:]
        ids = [
            [PAD if not real else token for token, real in zip(row, mask, strict=True)]
            for row, mask in zip(input_ids.tolist(), keep.tolist(), strict=True)
        ]
        found = self._step(kept, ids) if length == 1 and kept.length else self._whole(kept, ids, cache is not None)
        kept.length += length
        return found

    def _step(self, cache: ByteCache, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """One id a row, all rows together."""
        made: list[list[State]] = []
        for place, (reader, forest) in enumerate(zip(self.readers, cache.forests, strict=True)):
            states = [row[place] for row in cache.rows]
            moving = [row for row, (token,) in enumerate(ids) if token < EOS]
            new = reader.advance(forest, [states[row] for row in moving], [ids[row][0] for row in moving])
            for row, state in zip(moving, new, strict=True):
                states[row] = state
            for row, (token,) in enumerate(ids):
                if token in (BOS, EOS):
                    states[row] = reader.begin(forest)
            made.append(states)
        cache.rows = list(zip(*made, strict=True))
        return [np.stack([state.next for state in states])[:, None] for states in made]

    def _whole(self, cache: ByteCache, ids: Sequence[Sequence[int]], keep: bool) -> list[np.ndarray]:
        """Whole rows, one after the other; a prompt that stands there twice is read once."""
        known: dict[tuple[Any, ...], tuple[list[np.ndarray], tuple[State, ...]]] = {}
        for row, own in enumerate(ids):
            key = (tuple(own), *map(id, cache.rows[row]))
            if key not in known:
                pairs = []
                for place, reader in enumerate(self.readers):
                    state = cache.rows[row][place] if cache.rows[row] else None
                    pairs.append(self._row(reader, cache.forests[place], state, own, keep))
                known[key] = [nexts for nexts, _ in pairs], tuple(state for _, state in pairs)
        keys = [(tuple(own), *map(id, states)) for own, states in zip(ids, cache.rows, strict=True)]
        cache.rows = [known[key][1] for key in keys]
        return [np.stack([known[key][0][place] for key in keys]) for place in range(len(self.readers))]

    def _row(
        self, reader: ByteModel, forest: Forest, state: State | None, ids: Sequence[int], keep: bool
    ) -> tuple[np.ndarray, State]:
        """`[len(ids), 257]` and the state behind them; what is begun here is read apart from the other rows."""
        own = Forest(reader.reader) if state is None else forest
        state = reader.begin(own) if state is None else state
        nexts = np.empty((len(ids), EOS + 1))
        for begin, stop in _runs(ids):
            data = [token for token in ids[begin:stop] if token < EOS]
            if data:
                state = reader.follow(own, state, bytes(data), _noting(nexts[begin:stop]))
            else:
                state = state if ids[begin] == PAD else reader.begin(own)
                nexts[begin:stop] = state.next
        if keep and own is not forest:
            forest.adopt(own)
        return nexts, state

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Combined log-probabilities `[batch, length, 259]`; with `labels` also their mean cross entropy.

        Raises RequestError for an empty prompt and for another model's cache; RunError naming the member whose logits
        are NaN.
        """
        if not self.readers:
            raise RequestError(
                "an ensemble over bytes needs its members' tokenizers: load its folder, or read_with them"
            )
        if input_ids.shape[-1] == 0:
            raise RequestError("expected an id in every prompt, found none: begin it with bos_token")
        if past_key_values is not None and not isinstance(past_key_values, ByteCache):
            raise RequestError(
                f"an ensemble over bytes has a cache of its own, found {type(past_key_values).__name__}: give none"
            )
        cache = ByteCache() if use_cache and past_key_values is None else past_key_values
        found = self.byte_probabilities(input_ids, attention_mask, cache)
        log_probs = [_log_probs(each, logits_to_keep, self.device) for each in found]
        mixed = self.combine(log_probs, self.weights, self.options)
        self._check_outputs(mixed, log_probs, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=mixed, labels=labels, vocab_size=SIZE, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=mixed, past_key_values=cache)


def _check_decoders(config: EnsembleConfig) -> None:
    """Raises RequestError, naming the first member of another kind."""
    for entry in config.members:
        kind = kind_of([entry["config"]])
        if kind != "CausalLM":
            raise RequestError(
                f"member {entry['name']!r}: bytes are for decoders, found {WORDS[kind]}: members of that kind need one "
                "vocabulary"
            )


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of each stretch of bytes, and of each other id by itself."""
    begin = 0
    while begin < len(ids):
        stop = begin + 1
        while ids[begin] < EOS and stop < len(ids) and ids[stop] < EOS:
            stop += 1
        yield begin, stop
        begin = stop


def _noting(nexts: np.ndarray) -> Callable[[int, State], None]:
    """What writes down the next byte's probabilities behind each byte, `[bytes, 257]`."""

    def note(place: int, state: State) -> None:
        nexts[place] = state.next

    return note


def _log_probs(nexts: np.ndarray, keep: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`[batch, kept, 259] float32`: ids that are no bytes have probability zero, apart from the end."""
    if isinstance(keep, torch.Tensor):
        nexts = nexts[:, keep.cpu().numpy()]
    elif keep:
        nexts = nexts[:, -keep:]
    whole = torch.full((*nexts.shape[:-1], SIZE), -torch.inf)
    whole[..., : nexts.shape[-1]] = torch.from_numpy(nexts).log()
    return whole.to(device)


AutoModelForCausalLM.register(ByteEnsembleConfig, EnsembleOverBytes, exist_ok=True)
