"""What all ensembles are: members, a rule, weights, and a folder that names or contains the members."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from graft import lineage, models
from graft.ensemble import linear
from graft.ensemble.caches import keeps_layers
from graft.ensemble.configuration import EnsembleConfig, context_of, keeps_text, kind_of, layers_of, spans_of
from graft.ensemble.gate import Gate, Told
from graft.ensemble.lanes import Answer, Lanes
from graft.ensemble.members import copied, device_of, fresh, load_members, nan_words
from graft.ensemble.union import Union, union_of
from graft.errors import RequestError, RunError
from graft.methods import method
from graft.settings import parse


class Ensemble(PreTrainedModel):
    """Members whose predictions are combined by a rule of this folder."""

    config_class = EnsembleConfig
    base_model_prefix = "members"
    main_input_name = "input_ids"
    gives_log_probs = True
    """Logits are normalised: nobody need do it again."""
    _supports_sdpa = True
    writes = True
    """Whether the members write text, token by token."""

    def __init__(
        self, config: EnsembleConfig, members: Sequence[PreTrainedModel] | None = None, union: Union | None = None
    ):
        super().__init__(config)
        if (config.vocabulary == "union") != (union is not None):
            raise RequestError("an ensemble over a union of vocabularies is loaded with its members' tokenizers")
        self.union = union
        made = members if members is not None else [fresh(entry["config"]) for entry in config.members]
        self.members = nn.ModuleList(made)
        self.folder: Path | None = None
        rule = method("graft.ensemble", config.combine)
        self.options = parse(rule.Settings, config.options)
        # a gate gives its own; a product that is fitted to members which know little may have negative ones alone
        if config.gate is None and config.combine != "log_linear" and (wrong := rule.problem(config.weights)):
            raise RequestError(wrong)
        self.choose = getattr(rule, "choose", None)
        # what chooses among whole outputs has nothing to say of tokens: text is scored by the mixture
        self.combine = linear.combine if self.choose and self.writes else rule.combine
        self.active = [place for place, weight in enumerate(config.weights) if weight or config.gate]
        self.weights = torch.tensor([config.weights[place] for place in self.active], dtype=torch.float32)
        self.gate = Gate.from_plain(config.gate) if config.gate else None
        self.spans = spans_of(layers_of(config.members, config.weights, config.gate), int(keeps_text(config.gate)))
        self.limits = [context_of(entry["config"]) for entry in config.members]
        self.made_of = list(map(_glimpse, made))
        self.lanes = Lanes()
        self.takes = [set(inspect.signature(type(member).forward).parameters) for member in made]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Members come with their weights."""

    def get_input_embeddings(self) -> nn.Module:
        """The first member's."""
        return self.members[0].get_input_embeddings()  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where the first member is."""
        return device_of(self.members[0])

    @property
    def dtype(self) -> torch.dtype:
        """Log-probabilities are float32, whatever the members compute in."""
        return torch.float32

    @cached_property
    def caches(self) -> bool:
        """Whether what the members keep of a text are layers of keys and values, which one cache can hold. Where they
        cut it into tokens of their own, or keep a recurrent state, every step reads the whole text."""
        return self.union is None and all(_keeps_layers(self.members[place]) for place in self.active)

    def _told(
        self, read: Callable[[int], Told], mask: torch.Tensor | None, *, every: bool = False
    ) -> tuple[list[Told | None], torch.Tensor]:
        """What each active member says, asked by its number (None where the gate needs none; with `every` never), and
        the weights: `[members]`, or a gate's `[..., members]`.

        `mask [batch, length]`: padding needs nobody.
        """
        numbers = range(len(self.active))
        if self.gate is None:
            return list(self._each(numbers, read)), self.weights.to(self.device)
        asked = self._each(self.gate.looks_at, read)
        told: dict[int, Told] = dict(zip(self.gate.looks_at, asked, strict=True))
        weights = self.gate.decide(asked)
        needed = weights > 0 if every else _of_the_text(weights > 0, mask)
        rest = [n for n in numbers if n not in told and (every or bool(needed[..., n].any()))]
        told |= zip(rest, self._each(rest, read), strict=True)
        return [told.get(number) for number in numbers], weights

    def _each(self, numbers: Sequence[int], read: Callable[[int], Answer]) -> list[Answer]:
        """What active members say; those on several devices at the same time."""
        return self.lanes.run([self._lane(n) for n in numbers], [partial(read, n) for n in numbers])

    def _lane(self, number: int) -> str:
        place = self.active[number]
        return self.config.members[place].get("device") or str(device_of(self.members[place]))

    def mixed(self, told: Sequence[Told | None], weights: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The ensemble's log-probabilities `[..., vocabulary]`; members that were not run have no part in it.

        Raises RunError naming a member that gives NaN where `mask` does not say padding.
        """
        every = [None if each is None else each.log_probs for each in told]
        run = [number for number, each in enumerate(every) if each is not None]
        weights = weights if len(run) == len(told) else weights[..., run]
        log_probs = [each for each in every if each is not None]
        mixed = self.combine(log_probs, weights.to(log_probs[0].device), self.options)
        self._check_outputs(mixed, every, mask)
        return mixed

    def _check_inputs(
        self,
        input_ids: torch.Tensor | None,
        cache: Cache | None,
        places: Sequence[int] | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Raises RequestError for no ids, an empty prompt, and a context longer than that of a member in `places`
        (all). Where a text branches or is padded, the cache holds more than any token has before it: what counts then
        are the tokens' `positions`, for members that are told them."""
        if input_ids is None:
            raise RequestError(
                "an ensemble reads input_ids, found none: members have embeddings of their own, so that inputs_embeds "
                "mean something else to each"
            )
        length = input_ids.shape[-1]
        if length == 0:
            raise RequestError("expected a token in every prompt, found none: begin it with bos_token")
        total = length + (int(cache.get_seq_length()) if cache is not None else 0)
        for place in self.active if places is None else places:
            limit = self.limits[place]
            if limit is None or total <= limit:
                continue
            told = positions is not None and "position_ids" in self.takes[place]
            reached = int(positions.max()) + 1 if told and positions is not None else total
            if reached > limit:
                name = self.config.members[place]["name"]
                raise RequestError(
                    f"member {name!r} was made for {limit} tokens, found a context of {reached}: shorten it"
                )

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Refused, and so are the other ways into continuous batching: it pages the layers of one model."""
        raise RequestError(
            "expected a single model for continuous batching, found an ensemble, whose cache holds the layers of "
            "several: use generate with a batch that is padded on the left"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _check_asked(self, asked: dict[str, Any]) -> None:
        """Raises RequestError for outputs that only a single model has."""
        for name in ("output_hidden_states", "output_attentions"):
            if asked.get(name):
                raise RequestError(f"an ensemble cannot honour {name}: ask one of its `members`, each has its own")

    def _check_prompts(self, mask: torch.Tensor | None) -> None:
        """Raises RequestError where a row of a batch is all padding."""
        if mask is not None and mask.dim() == 2 and not mask.any(-1).all():
            rows = (~mask.any(-1)).nonzero().flatten().tolist()
            raise RequestError(
                f"expected a token in every prompt, found none in rows {rows}: begin them with bos_token"
            )

    def _check_outputs(
        self, mixed: torch.Tensor, log_probs: Sequence[torch.Tensor | None], mask: torch.Tensor | None
    ) -> None:
        """NaN in a logit makes the whole distribution NaN: looking at one token of the vocabulary is enough."""
        bad = mixed[..., 0].isnan()
        if mask is not None and mask.dim() == 2 and mask.shape[-1] >= bad.shape[-1] and mask.device == bad.device:
            bad = bad & mask[:, -bad.shape[-1] :].bool()
        if not bad.any():
            return
        for place, log_prob in zip(self.active, log_probs, strict=True):
            if log_prob is not None and log_prob[..., 0][bad].isnan().any():
                entry = self.config.members[place]
                raise RunError(nan_words(entry))
        raise RunError(
            f"{self.config.combine}: no token is possible for every member: use linear, which needs only one"
        )

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, *, self_contained: bool = False, **kwargs: Any
    ) -> None:
        """Write the configuration, which names the members relatively; `self_contained` copies them into the folder.

        Raises RequestError for members that lie in no folder, or have been trained since they were loaded from it,
        unless `self_contained` writes them.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = type(self.config).from_dict(self.config.to_dict())
        copies: dict[Any, str] = {}
        config.members = [
            self._inside(place, folder, copies) if self_contained else self._outside(place, folder)
            for place in range(len(self.members))
        ]
        config.gate = self.gate.plain() if self.gate is not None else None
        config.save_pretrained(folder)
        if self.writes:
            self.generation_config.save_pretrained(folder)

    def _source(self, place: int) -> Path | None:
        """The folder a member was loaded from, where it still is what that folder holds."""
        path = self.config.members[place]["path"]
        source = (self.folder or Path()) / path
        return source if path and source.is_dir() and not self._changed(place) else None

    def _changed(self, place: int) -> bool:
        """Whether a member was trained since it became one: a change of type or device is none."""
        then, now = self.made_of[place], _glimpse(self.members[place])
        pairs = zip(then, now, strict=False)
        return len(then) != len(now) or not all(torch.equal(a.to(b.dtype), b) for a, b in pairs)

    def _inside(self, place: int, folder: Path, copies: dict[Any, str]) -> dict[str, Any]:
        """The entry of a member that is copied into `folder`, unless one with the same weights has been."""
        entry, member, source = self.config.members[place], self.members[place], self._source(place)
        if source is not None:
            path = copied(source, folder, entry["name"], copies)
            return {**entry, "path": path, "hash": lineage.hash_model(folder / path)}
        same = tuple(weight.data_ptr() for weight in member.parameters())
        if same not in copies:
            copies[same] = f"members/{entry['name']}"
            nested = {"self_contained": True} if isinstance(member, Ensemble) else {}
            member.save_pretrained(folder / copies[same], **nested)  # type: ignore[operator]
        return {**entry, "path": copies[same], "hash": lineage.hash_model(folder / copies[same])}

    def _outside(self, place: int, folder: Path) -> dict[str, Any]:
        """The entry of a member as seen from `folder`."""
        entry, source = self.config.members[place], self._source(place)
        if source is None:
            found = "has been trained since it was loaded" if self._changed(place) else "lies in no folder"
            raise RequestError(f"member {entry['name']!r} {found}: save it first, or use self_contained=True")
        path = os.path.relpath(source.resolve(), folder.resolve())
        return {**entry, "path": path, "hash": entry["hash"] or lineage.hash_model(source)}

    def to(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As of any module; a member that has a device of its own stays there."""
        super().to(*args, **kwargs)
        for entry, member in zip(self.config.members, self.members, strict=True):
            if entry.get("device"):
                member.to(entry["device"])
        return self

    def train(self, mode: bool = True) -> Any:
        """As of any module; a member that is frozen stays as it is used, without dropout: what a gate is to learn from
        is what it will see."""
        super().train(mode)
        for member in self.members:
            if not any(weight.requires_grad for weight in member.parameters()):
                member.eval()
        return self

    @classmethod
    def _check_kind(cls, config: EnsembleConfig, folder: Path) -> None:
        """Raises RequestError for an ensemble of members of another kind."""
        found = f"EnsembleFor{kind_of([entry['config'] for entry in config.members], config.combine)}"
        if found != cls.__name__:
            raise RequestError(f"{folder}: expected {cls.__name__}, found {found}: use that class")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> Any:
        """The ensemble of a folder, its members loaded each by its own class.

        `device_map`: one device for all members, or `auto`, the accelerator if there is one. Raises CheckpointError
        where a member is missing or is no longer what the ensemble was made of, RequestError for an ensemble of another
        kind of members, for quantization, and for several devices.
        """
        if kwargs.get("quantization_config") is not None:
            raise RequestError("an ensemble cannot honour quantization_config: quantise its members, then combine them")
        if kwargs.get("state_dict") is not None:
            raise RequestError("an ensemble cannot honour state_dict: load it, then use load_state_dict")
        device = _one_device(kwargs.get("device_map"))
        folder = Path(pretrained_model_name_or_path)
        config = kwargs.get("config") or cls.config_class.from_pretrained(folder)
        cls._check_kind(config, folder)
        wanted = kwargs.get("dtype", kwargs.get("torch_dtype"))
        dtype = None if wanted in (None, "auto") else wanted
        members = load_members(config.members, folder, dtype)
        # the Auto classes put it into the configuration
        attention = kwargs.get("attn_implementation") or config._attn_implementation_internal
        for member in members if attention is not None else ():
            member.set_attn_implementation(str(attention))
        union = None
        if config.vocabulary == "union":
            union = union_of([models.load_tokenizer(folder / entry["path"]) for entry in config.members])
        model = cls(config, members, union).eval()
        model = model if device is None else model.to(device)
        model.folder = folder.resolve()
        if (folder / "generation_config.json").exists():
            model.generation_config = type(model.generation_config).from_pretrained(folder)
        if kwargs.get("output_loading_info"):
            return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return model


def _one_device(asked: Any) -> torch.device | None:
    """The device that a `device_map` names; None where none is asked for. Raises RequestError for several."""
    if asked is None:
        return None
    one: Any = asked.get("") if isinstance(asked, dict) and len(asked) == 1 else asked
    try:
        return torch.accelerator.current_accelerator() or torch.device("cpu") if one == "auto" else torch.device(one)
    except (RuntimeError, TypeError):
        raise RequestError(
            f"expected one device for an ensemble, found device_map={asked!r}: give its members a `device` each"
        ) from None


GLIMPSE = 64
"""Values of each tensor that are looked at to see whether a member was trained: a step of an optimizer changes nearly
all."""


def _glimpse(member: nn.Module) -> list[torch.Tensor]:
    """A few values of every weight, at even distances, as they are now."""
    flat = [weight.detach().flatten() for weight in member.parameters()]
    return [each[:: max(1, len(each) // GLIMPSE)].clone().cpu() for each in flat]


def _keeps_layers(member: Any) -> bool:
    return member.caches if isinstance(member, Ensemble) else keeps_layers(member)


def _of_the_text(needed: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`needed [batch, length, members]` without what padding would need."""
    if mask is None or mask.dim() != 2 or needed.dim() != 3 or mask.shape[-1] < needed.shape[1]:
        return needed
    return needed & mask[:, -needed.shape[1] :, None].bool().to(needed.device)


def log_probs_of(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32 of a member's logits `[..., vocabulary]`, which nobody needs afterwards.

    Where no gradient is wanted they are computed in place: on a processor, memory that is new to it costs more than the
    arithmetic.
    """
    logits = logits.float()
    if logits.device.type != "cpu" or not logits.is_contiguous() or (torch.is_grad_enabled() and logits.requires_grad):
        return logits.log_softmax(-1)
    return torch.log_softmax(logits, -1, out=logits)


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor there; anything else as it is."""
    return value.to(device) if isinstance(value, torch.Tensor) else value
