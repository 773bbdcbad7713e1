"""The configuration of an ensemble: its members' own, and what `transformers` asks of the whole.

It reports the sum of the members' layers, so that `generate` makes one cache with all members' layers end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from graft.ensemble.settings import MOVE
from graft.errors import CheckpointError, RequestError
from graft.folders import CONTEXTS, ensemble_problem


class EnsembleConfig(PretrainedConfig):
    """`members`: name, path (relative to the ensemble's folder), hash and configuration of each; `combine`: the rule,
    `options`: its settings; `weights`: one for each member. A member whose weight is zero is never run. `gate`:
    weights that follow the context; `weights` are then what it gave on average. `vocabulary`: `same`, or `union` of
    the members' token strings (`vocab_size` of them). `draft`: the member that drafts where the ensemble speculates.
    `boundaries`: of a union, how many tokens the first member drafts where members are combined only at common
    boundaries, and where they differ.

    Raises CheckpointError for members, weights, a gate or a draft that do not fit each other."""

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
        boundaries: int | None = None,
        **kwargs: Any,
    ):
        named = list(members) if isinstance(members, tuple) else members
        said = {"members": named, "weights": list(weights), "gate": gate, "draft": draft}
        # without any member and weight it is what `transformers` compares others with
        if (named or weights) and (why := ensemble_problem(said)):
            raise CheckpointError(f"an ensemble's configuration: {why}")
        self.members, self.combine, self.options = list(named), combine, dict(options or {})
        self.weights = [float(weight) for weight in weights]
        self.gate, self.draft, self.boundaries = gate, draft, boundaries
        configs = [of_text(entry["config"]) for entry in self.members]
        self.vocabulary = vocabulary
        smallest = min((int(c["vocab_size"]) for c in configs), default=0)
        self.vocab_size = vocab_size if vocab_size and vocabulary == "union" else smallest
        self.num_hidden_layers = layers_in_all(self.members, self.weights, gate)
        self.layer_types = ["full_attention"] * self.num_hidden_layers
        longest = [n for n in map(context_of, configs) if n]
        self.max_position_embeddings = min(longest, default=None)
        self.hidden_size = max(map(width_of, configs), default=0)
        self.num_attention_heads = max(
            (_first(c, "num_attention_heads", "n_head", "n_heads") or 0 for c in configs), default=0
        )
        kind = kind_of(configs, combine)
        kwargs.setdefault("architectures", [f"EnsembleFor{kind}"])
        kwargs["is_encoder_decoder"] = kind == "Seq2SeqLM"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            kwargs.setdefault(name, configs[0].get(name) if configs else None)
        if kind == "SequenceClassification":
            kwargs.setdefault("id2label", configs[0].get("id2label"))
            kwargs.setdefault("label2id", configs[0].get("label2id"))
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


def kind_of(configs: Sequence[dict[str, Any]], combine: str = "linear") -> str:
    """What an ensemble of such members is: `CausalLM`, `Seq2SeqLM` or `SequenceClassification`, as `transformers` names
    it.

    Raises RequestError for members of several kinds; only rules in MOVE may have decoders beside an encoder-decoder.
    """
    kinds = [_kind(config) for config in configs]
    if len(set(kinds)) <= 1:
        return kinds[0] if kinds else "CausalLM"
    if combine in MOVE and kinds[0] == "Seq2SeqLM" and set(kinds[1:]) == {"CausalLM"}:
        return "Seq2SeqLM"
    named = " beside ".join(dict.fromkeys(WORDS[kind] for kind in kinds))
    raise RequestError(f"expected members of one kind, found {named}: leave one kind out")


WORDS = {
    "CausalLM": "decoders",
    "Seq2SeqLM": "encoder-decoders",
    "SequenceClassification": "classifiers",
}


def _kind(config: dict[str, Any]) -> str:
    if any("ForSequenceClassification" in name for name in config.get("architectures") or ()):
        return "SequenceClassification"
    return "Seq2SeqLM" if config.get("is_encoder_decoder") else "CausalLM"


def of_text(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of a model's text: of one that reads images too, that stands in a part of its own."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    kept: dict[str, Any] = {name: config[name] for name in ("architectures", "model_type") if name in config}
    return config | text | kept


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if config.get(name)), None)


def layers_of(
    members: Sequence[dict[str, Any]], weights: Sequence[float], gate: dict[str, Any] | None = None
) -> list[int]:
    """Layers that each member has in the common cache: none where its weight is zero and no gate gives it others."""
    pairs = zip(members, weights, strict=True)
    return [_layers(entry["config"]) if weight or gate is not None else 0 for entry, weight in pairs]


def layers_in_all(members: Sequence[dict[str, Any]], weights: Sequence[float], gate: dict[str, Any] | None) -> int:
    """Layers of the common cache: the members', and before them one of the text where a gate may leave members out."""
    return sum(layers_of(members, weights, gate)) + keeps_text(gate)


def keeps_text(gate: dict[str, Any] | None) -> bool:
    """Whether a gate looks at some members only, so that others read what they have missed later."""
    return gate is not None and len(gate.get("looks_at", ())) not in (0, len(gate["state"]["outer.bias"]))


def _layers(config: dict[str, Any]) -> int:
    if config.get("model_type") == EnsembleConfig.model_type:
        return layers_in_all(config["members"], config["weights"], config.get("gate"))
    config = of_text(config)
    decoders = ("num_decoder_layers", "decoder_layers") if config.get("is_encoder_decoder") else ()
    found = _first(config, *decoders, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if found is None:
        raise RequestError(
            f"a member of type {config.get('model_type')!r} names no number of layers: it has no cache to share"
        )
    return found


def width_of(config: dict[str, Any]) -> int:
    """Channels of a model's hidden states; 0 where its configuration does not say."""
    return _first(of_text(config), "hidden_size", "n_embd", "d_model") or 0


def context_of(config: dict[str, Any]) -> int | None:
    """Tokens that a model of this configuration was made for; None where it names no limit."""
    if config.get("is_encoder_decoder"):  # of source and target; relative positions have no limit
        return _first(config, "max_position_embeddings")
    if config.get("model_type") == EnsembleConfig.model_type:
        return min((n for n in (context_of(entry["config"]) for entry in config["members"]) if n), default=None)
    return _first(of_text(config), *CONTEXTS)


def spans_of(layers: Sequence[int], first: int = 0) -> list[tuple[int, int]]:
    """Where each member's layers begin and end in the common cache, in which `first` others stand before them."""
    ends = [first + sum(layers[: place + 1]) for place in range(len(layers))]
    return [(end - size, end) for end, size in zip(ends, layers, strict=True)]


AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
