"""An ensemble of causal models with any tokenizers, as a `transformers` model over bytes.

Each member gives exact probabilities of the next byte (`byte_model.py`), which the rule combines. The vocabulary is the
256 bytes and three ids that begin, end and pad texts (`tokenizer.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from graft import models
from graft.allocator import unsearched
from graft.ensemble.base import Ensemble
from graft.ensemble.byte_level.asking import Reading, together
from graft.ensemble.byte_level.byte_model import ByteModel, Cover
from graft.ensemble.byte_level.cache import ByteCache, Read
from graft.ensemble.byte_level.configuration import ByteEnsembleConfig
from graft.ensemble.byte_level.cover import State
from graft.ensemble.byte_level.following import Note
from graft.ensemble.byte_level.forest import Forest
from graft.ensemble.byte_level.prompts import reached
from graft.ensemble.byte_level.tokenizer import BOS, EOS, PAD, SIZE, byte_tokenizer
from graft.ensemble.configuration import WORDS, EnsembleConfig, context_of, kind_of
from graft.ensemble.gate import Told
from graft.ensemble.members import home_of
from graft.errors import RequestError
from graft.products import quick_layers


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

    def _begun(self, cache: ByteCache | None, batch: int) -> ByteCache:
        """The cache, or a new one, with a place for every row and member."""
        cache = ByteCache() if cache is None else cache
        if not cache.forests:
            cache.forests = [Forest(reader.reader) for reader in self.readers]
            cache.rows = [(Read(),) * len(self.readers)] * batch
        return cache

    @torch.no_grad()
    @unsearched()
    @quick_layers()
    def _read(
        self, number: int, cache: ByteCache, ids: Sequence[Sequence[int]], places: np.ndarray
    ) -> tuple[torch.Tensor, list[State]]:
        """What an active member gives the next byte behind the ids at these places, `[batch, places, 259]`, with what
        it has missed read first, and its states behind them."""
        reader, forest = self.readers[number], cache.forests[number]
        before = [row[number].state for row in cache.rows]
        missed = [row[number].missed for row in cache.rows]
        rows = [[*old, *new] for old, new in zip(missed, ids, strict=True)]
        known = [state for state in before if state is not None]
        if len(rows[0]) == 1 and len(known) == len(rows):
            states = _advanced(reader, forest, known, [own for (own,) in rows])
            nexts = np.stack([state.next for state in states])[:, None]
        else:
            nexts, states = _whole(reader, forest, before, rows, places + len(missed[0]))
        return _log_probs(nexts, self.device), states

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
        batch, length = input_ids.shape
        cache = self._begun(past_key_values, batch)
        places = np.arange(length)
        keep = logits_to_keep
        places = places[keep.cpu().numpy()] if isinstance(keep, torch.Tensor) else places[-keep:]
        mask = None if attention_mask is None else attention_mask[:, -length:]
        ids = (input_ids if mask is None else input_ids.masked_fill(mask == 0, PAD)).tolist()
        states: dict[int, list[State]] = {}

        def read(number: int) -> Told:
            log_probs, states[number] = self._read(number, cache, ids, places)
            return Told(log_probs)

        told, weights = self._told(read, None if mask is None else mask[:, torch.from_numpy(places)])
        mixed = self.mixed(told, weights, attention_mask)
        cache.rows = [
            tuple(
                Read(states[number][row]) if number in states else Read(old.state, (*old.missed, *ids[row]))
                for number, old in enumerate(reads)
            )
            for row, reads in enumerate(cache.rows)
        ]
        cache.length += length
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=mixed, labels=labels, vocab_size=SIZE, **kwargs)
        given = use_cache or past_key_values is not None
        return CausalLMOutputWithPast(loss=loss, logits=mixed, past_key_values=cache if given else None)


def _check_decoders(config: EnsembleConfig) -> None:
    """Raises RequestError, naming the first member of another kind."""
    for entry in config.members:
        kind = kind_of([entry["config"]])
        if kind != "CausalLM":
            raise RequestError(
                f"member {entry['name']!r}: bytes are for decoders, found {WORDS[kind]}: members of that kind need one "
                "vocabulary"
            )


def _advanced(reader: ByteModel, forest: Forest, states: Sequence[State], ids: Sequence[int]) -> list[State]:
    """Each row one id on, all together."""
    if max(ids) < EOS:
        return reader.advance(forest, states, ids)
    found = list(states)
    moving = [row for row, token in enumerate(ids) if token < EOS]
    begun = [row for row, token in enumerate(ids) if token in (BOS, EOS)]
    new = reader.advance(forest, [states[row] for row in moving], [ids[row] for row in moving])
    new += reader.begin(forest, [states[row].tree for row in begun])
    for row, state in zip([*moving, *begun], new, strict=True):
        found[row] = state
    return found


def _whole(
    reader: ByteModel,
    forest: Forest,
    before: Sequence[State | None],
    rows: Sequence[Sequence[int]],
    places: np.ndarray,
) -> tuple[np.ndarray, list[State]]:
    """Many ids a row, all rows together; a prompt that stands there twice is read once.

    Returns the next byte's probabilities `[batch, places, 257]` and the states behind the rows.
    """
    keys = [(tuple(own), id(state)) for own, state in zip(rows, before, strict=True)]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    starts = _starts(reader, forest, [(before[row], rows[row]) for row in first.values()], places)
    readings = [_row(reader, forest, *start) for start in starts]
    found = dict(zip(first, together(forest, readings), strict=True))
    return np.stack([found[key][0] for key in keys]), [found[key][1] for key in keys]


def _starts(
    reader: ByteModel, forest: Forest, rows: Sequence[tuple[State | None, Sequence[int]]], places: np.ndarray
) -> list[tuple[State | int, Sequence[int], np.ndarray]]:
    """Of each row, the state or the new tree that it goes on from, the ids that are still to be read, and the places
    among these; of new ones of which only the end is asked, all but the last id is read where that can be done fast."""
    texts = [_text(ids) if state is None and places.tolist() == [len(ids) - 1] else b"" for state, ids in rows]
    found = reached(reader, forest, texts)
    trees = iter(forest.plant(sum(old is None and new is None for (old, _), new in zip(rows, found, strict=True))))
    return [
        (old or next(trees), ids, places) if new is None else (new, ids[-1:], np.zeros(1, np.int64))
        for (old, ids), new in zip(rows, found, strict=True)
    ]


def _text(ids: Sequence[int]) -> bytes:
    """The bytes behind what begins or pads a row; none where other ids stand among them."""
    begin = next((place for place, token in enumerate(ids) if token < EOS), len(ids))
    return bytes(ids[begin:]) if max(ids[begin:], default=EOS) < EOS else b""


def _row(
    reader: ByteModel, forest: Forest, before: State | int, ids: Sequence[int], places: np.ndarray
) -> Reading[tuple[np.ndarray, State]]:
    """The next byte's probabilities `[places, 257]` behind these ids of a row, and the state behind all of them.

    `before`: the state behind what it said before, or the tree of a new row.
    """
    state = before if isinstance(before, State) else (yield from reader.beginning(forest, before))
    row_of = {int(place): row for row, place in enumerate(places)}
    nexts = np.empty((len(places), EOS + 1))

    def note(place: int, state: State) -> None:
        if place in row_of:
            nexts[row_of[place]] = state.next

    for begin, stop in _runs(ids):
        if ids[begin] < EOS:
            state = yield from reader.following(forest, state, bytes(ids[begin:stop]), _behind(note, begin))
        elif ids[begin] != PAD:
            state = yield from reader.beginning(forest, state.tree)
        if ids[begin] >= EOS:
            note(begin, state)
    return nexts, state


def _behind(note: Note, places: int) -> Note:
    """The same for a text that stands so many places further."""
    return lambda place, state: note(places + place, state)


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of each stretch of bytes, and of each other id by itself."""
    begin = 0
    while begin < len(ids):
        stop = begin + 1
        while ids[begin] < EOS and stop < len(ids) and ids[stop] < EOS:
            stop += 1
        yield begin, stop
        begin = stop


def _log_probs(nexts: np.ndarray, device: torch.device) -> torch.Tensor:
    """`[batch, kept, 259] float32`: ids that are no bytes have probability zero, apart from the end."""
    whole = torch.full((*nexts.shape[:-1], SIZE), -torch.inf)
    whole[..., : nexts.shape[-1]] = torch.from_numpy(nexts).log()
    return whole.to(device)


AutoModelForCausalLM.register(ByteEnsembleConfig, EnsembleOverBytes, exist_ok=True)
