"""An ensemble that is a `transformers` causal LM: it loads, scores, generates and saves like any other.

Its configuration reports the sum of the members' layers, so that `generate` makes one cache with all members' layers
end to end; each member gets a view of its own span of layers. Reordering for beams, cropping and repeating act on the
whole cache and are therefore right for every member without further code.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from graft import lineage, models
from graft.ensemble.gate import Gate, features
from graft.ensemble.settings import NOT_A_MIXTURE
from graft.ensemble.speculative import Speculated, speculate
from graft.ensemble.union import Union, union_of
from graft.errors import CheckpointError, RequestError, RunError
from graft.methods import method
from graft.settings import parse


class EnsembleConfig(PretrainedConfig):
    """`members`: name, path (relative to the ensemble's folder), hash and configuration of each; `combine`: the rule,
    `options`: its settings; `weights`: one for each member. A member whose weight is zero is never run. `gate`: weights
    that follow the context; `weights` are then what it gave on average. `vocabulary`: `same`, or `union` of the
    members' token strings (`vocab_size` of them). `draft`: the member that drafts where the ensemble speculates."""

    model_type = "graft_ensemble"

    def __init__(
        self,
        members: Sequence[dict[str, Any]] = (),
        combine: str = "linear",
        weights: Sequence[float] = (),
        options: dict[str, Any] | None = None,
        gate: dict[str, Any] | None = None,
        vocabulary: str = "same",
        vocab_size: int | None = None,
        draft: str | None = None,
        **kwargs: Any,
    ):
        self.members = list(members)
        self.combine, self.options = combine, dict(options or {})
        self.weights = [float(weight) for weight in weights]
        self.gate, self.draft = gate, draft
        configs = [entry["config"] for entry in self.members]
        self.vocabulary = vocabulary
        smallest = min((int(c["vocab_size"]) for c in configs), default=0)
        self.vocab_size = vocab_size if vocab_size and vocabulary == "union" else smallest
        self.num_hidden_layers = sum(layers_of(self.members, self.weights))
        self.layer_types = ["full_attention"] * self.num_hidden_layers
        longest = [n for n in map(_context, configs) if n]
        self.max_position_embeddings = min(longest, default=None)
        self.hidden_size = max((_first(c, "hidden_size", "n_embd", "d_model") or 0 for c in configs), default=0)
        self.num_attention_heads = max(
            (_first(c, "num_attention_heads", "n_head", "n_heads") or 0 for c in configs), default=0
        )
        kind = "Seq2SeqLM" if configs and configs[0].get("is_encoder_decoder") else "CausalLM"
        kwargs.setdefault("architectures", [f"EnsembleFor{kind}"])
        kwargs["is_encoder_decoder"] = kind == "Seq2SeqLM"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            kwargs.setdefault(name, configs[0].get(name) if configs else None)
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if config.get(name)), None)


def layers_of(members: Sequence[dict[str, Any]], weights: Sequence[float]) -> list[int]:
    """Layers that each member has in the common cache: none where its weight is zero."""
    return [_layers(entry["config"]) if weight else 0 for entry, weight in zip(members, weights, strict=True)]


def _layers(config: dict[str, Any]) -> int:
    if config.get("model_type") == EnsembleConfig.model_type:
        return sum(layers_of(config["members"], config["weights"]))
    decoders = ("num_decoder_layers", "decoder_layers") if config.get("is_encoder_decoder") else ()
    found = _first(config, *decoders, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if found is None:
        raise RequestError(
            f"a member of type {config.get('model_type')!r} names no number of layers: it has no cache to share"
        )
    return found


def _context(config: dict[str, Any]) -> int | None:
    if config.get("is_encoder_decoder"):
        return None
    if config.get("model_type") == EnsembleConfig.model_type:
        return min((n for n in (_context(entry["config"]) for entry in config["members"]) if n), default=None)
    return _first(config, "max_position_embeddings", "n_positions", "max_seq_len")


class CacheView(Cache):
    """A member's span of the ensemble's cache: the very same layer objects."""

    def __init__(self, whole: Cache, start: int, stop: int):
        super().__init__(layers=whole.layers[start:stop])


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """Members whose log-probabilities are combined at every token by a rule of this folder.

    `logits` are normalised log-probabilities in float32: [batch, length, vocabulary].
    """

    config_class = EnsembleConfig
    base_model_prefix = "members"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(
        self, config: EnsembleConfig, members: Sequence[PreTrainedModel] | None = None, union: Union | None = None
    ):
        super().__init__(config)
        if (config.vocabulary == "union") != (union is not None):
            raise RequestError("an ensemble over a union of vocabularies is loaded with its members' tokenizers")
        self.union = union
        made = members if members is not None else [_fresh(entry["config"]) for entry in config.members]
        self.members = nn.ModuleList(made)
        self.folder: Path | None = None
        rule = method("graft.ensemble", config.combine)
        self.combine, self.options = rule.combine, parse(rule.Settings, config.options)
        self.active = [place for place, weight in enumerate(config.weights) if weight]
        self.weights = torch.tensor([config.weights[place] for place in self.active], dtype=torch.float32)
        self.gate = Gate.from_plain(config.gate) if config.gate else None
        self.spans = _spans(layers_of(config.members, config.weights))
        self.limits = [_context(entry["config"]) for entry in config.members]
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
        return next(self.members[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Log-probabilities are float32, whatever the members compute in."""
        return torch.float32

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

    def _check_outputs(self, mixed: torch.Tensor, log_probs: Sequence[torch.Tensor], mask: torch.Tensor | None) -> None:
        """NaN in a logit makes the whole distribution NaN: looking at one token of the vocabulary is enough."""
        bad = mixed[..., 0].isnan()
        if mask is not None and mask.dim() == 2 and mask.shape[-1] >= bad.shape[-1] and mask.device == bad.device:
            bad = bad & mask[:, -bad.shape[-1] :].bool()
        if not bad.any():
            return
        for place, log_prob in zip(self.active, log_probs, strict=True):
            if log_prob[..., 0][bad].isnan().any():
                entry = self.config.members[place]
                raise RunError(f"member {entry['name']!r} ({entry['path']}) gives NaN logits: check its weights")
        raise RunError(
            f"{self.config.combine}: no token is possible for every member: use linear, which needs only one"
        )

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, *, self_contained: bool = False, **kwargs: Any
    ) -> None:
        """Write the configuration, which names the members relatively; `self_contained` copies them into the folder.

        Raises RequestError for an ensemble made of models that lie in no folder, unless `self_contained` writes them.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = EnsembleConfig.from_dict(self.config.to_dict())
        entries = []
        for entry, member in zip(self.config.members, self.members, strict=True):
            entries.append(self._placed(entry, member, folder, self_contained))
        config.members = entries
        config.gate = self.gate.plain() if self.gate is not None else None
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)

    def _placed(self, entry: dict[str, Any], member: Any, folder: Path, self_contained: bool) -> dict[str, Any]:
        """The entry of a member as seen from `folder`."""
        source = (self.folder or Path()) / entry["path"] if entry["path"] else None
        if self_contained:
            inside = folder / "members" / entry["name"]
            if source is not None and source.is_dir():
                shutil.copytree(source, inside, dirs_exist_ok=True)
            else:
                nested = {"self_contained": True} if isinstance(member, EnsembleForCausalLM) else {}
                member.save_pretrained(inside, **nested)
            return {**entry, "path": f"members/{entry['name']}", "hash": lineage.hash_model(inside)}
        if source is None:
            raise RequestError(f"member {entry['name']!r} lies in no folder: save it first, or use self_contained=True")
        return {**entry, "path": os.path.relpath(source.resolve(), folder.resolve())}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> Any:
        """The ensemble of a folder, its members loaded each by its own class.

        Raises CheckpointError where a member is missing or is no longer what the ensemble was made of.
        """
        refused = [name for name in ("device_map", "quantization_config") if kwargs.get(name) is not None]
        if refused:
            raise RequestError(f"an ensemble cannot honour {', '.join(refused)}: load it and move its members")
        folder = Path(pretrained_model_name_or_path)
        config = kwargs.get("config") or EnsembleConfig.from_pretrained(folder)
        wanted = kwargs.get("dtype", kwargs.get("torch_dtype"))
        dtype = None if wanted in (None, "auto") else wanted
        members = [_load(entry, folder, dtype) for entry in config.members]
        union = None
        if config.vocabulary == "union":
            union = union_of([models.load_tokenizer(folder / entry["path"]) for entry in config.members])
        model = ensemble_class(config)(config, members, union).eval()
        model.folder = folder.resolve()
        if (folder / "generation_config.json").exists():
            model.generation_config = type(model.generation_config).from_pretrained(folder)
        if kwargs.get("output_loading_info"):
            return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return model


def _load(entry: dict[str, Any], folder: Path, dtype: Any) -> PreTrainedModel:
    place = folder / entry["path"]
    if not (place / "config.json").exists():
        raise CheckpointError(f"{folder}: member {entry['name']!r} is missing: expected a model in {place}")
    found = lineage.hash_model(place)
    if entry.get("hash") and found != entry["hash"]:
        raise CheckpointError(
            f"{folder}: member {entry['name']!r} has changed since the ensemble was made (hash {found[:12]}, expected "
            f"{entry['hash'][:12]}): make the ensemble anew"
        )
    return models.load(place, dtype=dtype)


def ensemble_class(config: EnsembleConfig) -> type[EnsembleForCausalLM]:
    """The class of an ensemble with these members. Raises RequestError for encoder-decoders mixed with decoders."""
    kinds = {bool(entry["config"].get("is_encoder_decoder")) for entry in config.members}
    if len(kinds) > 1:
        raise RequestError("expected members of one kind, found encoder-decoders beside decoders: leave one kind out")
    from graft.ensemble.seq2seq import EnsembleForSeq2SeqLM

    return EnsembleForSeq2SeqLM if kinds == {True} else EnsembleForCausalLM


def _fresh(config: dict[str, Any]) -> PreTrainedModel:
    plain = dict(config)
    auto = AutoModelForSeq2SeqLM if plain.get("is_encoder_decoder") else AutoModelForCausalLM
    return auto.from_config(AutoConfig.for_model(plain.pop("model_type"), **plain))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _spans(layers: Sequence[int]) -> list[tuple[int, int]]:
    ends = [sum(layers[: place + 1]) for place in range(len(layers))]
    return [(end - size, end) for end, size in zip(ends, layers, strict=True)]


def member_entry(name: str, folder: Path, seen_from: Path) -> dict[str, Any]:
    """What a configuration says of a member: name, path from the ensemble's folder, hash, configuration."""
    config = lineage.read_config(folder)
    path = os.path.relpath(folder.resolve(), seen_from.resolve())
    return {"name": name, "path": path, "hash": lineage.hash_model(folder), "config": config}


def ensemble_of(
    members: dict[str, PreTrainedModel],
    weights: Sequence[float] | None = None,
    combine: str = "linear",
    *,
    union: Union | None = None,
    **options: Any,
) -> EnsembleForCausalLM:
    """An ensemble of models in memory, with the rule's own weights where none are given.

    `union` is that of the members' tokenizers (`union_of`) where their vocabularies differ; a mixture's only. Raises
    RequestError for weights that the rule cannot use.
    """
    rule = method("graft.ensemble", combine)
    parsed = parse(rule.Settings, options)
    chosen = rule.default(len(members), parsed) if weights is None else list(weights)
    if len(chosen) != len(members):
        raise RequestError(f"expected {len(members)} weights, found {len(chosen)}")
    if wrong := rule.problem(chosen):
        raise RequestError(wrong)
    entries = [
        {"name": name, "path": model.config._name_or_path or "", "hash": "", "config": model.config.to_dict()}
        for name, model in members.items()
    ]
    if union is not None and combine != "linear":
        raise RequestError(NOT_A_MIXTURE.format(combine))
    over: dict[str, Any] = {"vocabulary": "union", "vocab_size": len(union.tokens)} if union else {}
    config = EnsembleConfig(entries, combine, chosen, parsed.plain(), **over)
    return ensemble_class(config)(config, list(members.values()), union).eval()


def register() -> None:
    """Make the Auto classes of `transformers` know ensembles."""
    AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
    AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)
    # registers its class as it is imported; not above, since its class is made from the one here
    import graft.ensemble.seq2seq  # noqa: F401


register()
