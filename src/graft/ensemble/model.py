"""Ensembles as models: the class for each kind of members, and ensembles of models that are in memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import PreTrainedModel

from graft.ensemble.base import Ensemble
from graft.ensemble.byte_level.byte_model import Cover
from graft.ensemble.byte_level.configuration import ByteEnsembleConfig
from graft.ensemble.byte_level.model import EnsembleOverBytes
from graft.ensemble.causal import EnsembleForCausalLM
from graft.ensemble.classification import EnsembleForSequenceClassification
from graft.ensemble.configuration import EnsembleConfig, kind_of
from graft.ensemble.seq2seq import EnsembleForSeq2SeqLM
from graft.ensemble.settings import NOT_A_MIXTURE
from graft.ensemble.union import Union
from graft.errors import CannotCombine, RequestError
from graft.methods import method
from graft.one_way import check_one_way
from graft.settings import parse
from graft.vocabulary import vocabulary_hash

__all__ = [
    "EnsembleConfig",
    "EnsembleForCausalLM",
    "EnsembleForSeq2SeqLM",
    "EnsembleForSequenceClassification",
    "EnsembleOverBytes",
    "ensemble_class",
    "ensemble_of",
]


def ensemble_class(config: EnsembleConfig) -> type[Ensemble]:
    """The class of an ensemble with these members. Raises RequestError for members of several kinds."""
    kinds: dict[str, type[Ensemble]] = {
        "CausalLM": EnsembleForCausalLM,
        "Seq2SeqLM": EnsembleForSeq2SeqLM,
        "SequenceClassification": EnsembleForSequenceClassification,
    }
    return kinds[kind_of([entry["config"] for entry in config.members], config.combine)]


def ensemble_of(
    members: dict[str, PreTrainedModel],
    weights: Sequence[float] | None = None,
    combine: str = "linear",
    *,
    union: Union | None = None,
    tokenizers: Sequence[Any] | None = None,
    cover: Cover | None = None,
    **options: Any,
) -> Any:
    """An ensemble of models in memory, with the rule's own weights where none are given.

    `union` is that of the members' tokenizers (`union_of`) where their vocabularies differ; a mixture's only. With
    `tokenizers`, one for each member, the ensemble is over bytes; `cover` says which token sequences count. Raises
    RequestError for what is no model and for weights that the rule cannot use, CannotCombine for other vocabularies
    without either and for a tokenizer whose tokens have no bytes.
    """
    _check_models(members)
    rule = method("graft.ensemble", combine)
    parsed = parse(rule.Settings, options)
    chosen = rule.default(len(members), parsed) if weights is None else _numbers(weights)
    if len(chosen) != len(members):
        raise RequestError(f"expected {len(members)} weights, found {len(chosen)}")
    if wrong := rule.problem(chosen):
        raise RequestError(wrong)
    if union is None and tokenizers is None:
        _check_vocabularies(members)
    entries = [
        {"name": name, "path": model.config._name_or_path or "", "hash": "", "config": _config(model)}
        | ({"dropout": model.graft_dropout} if hasattr(model, "graft_dropout") else {})
        for name, model in members.items()
    ]
    if union is not None and combine != "linear":
        raise RequestError(NOT_A_MIXTURE.format(combine))
    if tokenizers is not None:
        over_bytes = ByteEnsembleConfig(entries, combine, chosen, parsed.plain(), cover=asdict(cover or Cover()))
        return EnsembleOverBytes(over_bytes, list(members.values()), tokenizers).eval()
    over: dict[str, Any] = {"vocabulary": "union", "vocab_size": len(union.tokens)} if union else {}
    config = EnsembleConfig(entries, combine, chosen, parsed.plain(), **over)
    return ensemble_class(config)(config, list(members.values()), union).eval()


def _check_models(members: Mapping[str, Any]) -> None:
    if not members:
        raise RequestError("expected a member, found none")
    for name, model in members.items():
        if not isinstance(model, PreTrainedModel):
            raise RequestError(
                f"member {name!r}: expected a model of transformers, found {type(model).__name__}: load its folder "
                "with graft.load, which reads adapters too"
            )
        if kind_of([_config(model)]) == "CausalLM":
            check_one_way(model)


def _numbers(weights: Sequence[Any]) -> list[float]:
    try:
        found = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise RequestError(f"expected weights that are numbers, found {weights!r}") from None
    if not all(map(math.isfinite, found)):
        raise RequestError(f"expected finite weights, found {found}")
    return found


PADDING = 1024
"""Rows by which vocabularies of the same tokens may differ: fewer are taken to pad one to a round size."""


def _check_vocabularies(members: Mapping[str, PreTrainedModel]) -> None:
    """By the tokens of the folders that members were loaded from; of others the numbers of tokens have to do."""
    known = {name: _tokens(model) for name, model in members.items()}
    first = next((name for name, tokens in known.items() if tokens is not None), None)
    unlike = next((name for name, tokens in known.items() if tokens not in (None, known.get(first or ""))), None)
    sizes = {name: int(model.config.get_text_config().vocab_size) for name, model in members.items()}
    least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if unlike is None and sizes[most] - sizes[least] < PADDING:
        return
    one, other = (least, most) if unlike is None else (first, unlike)
    raise CannotCombine(
        f"{other} and {one} have different vocabularies ({sizes[other]} and {sizes[str(one)]} tokens): their "
        "predictions cannot be matched token by token; give `tokenizers`, one for each member, for an ensemble over "
        "bytes, or for a mixture the `union` of them"
    )


def _tokens(model: PreTrainedModel) -> str | None:
    """What tells a vocabulary from others, where the model was loaded from a folder with a tokenizer."""
    folder = Path(model.config._name_or_path or "/dev/null")
    found = vocabulary_hash(folder) if folder.is_dir() else "none:"
    return None if found.startswith("none:") else found


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """A model's configuration as it is when saved, with its class."""
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def name_classes() -> None:
    """Name the classes in `transformers`, where its server and others look for the one that a configuration names.

    Loading a processor makes the package anew (`direct_transformers_import`): who has imported it before holds an
    earlier one, which is not in `sys.modules` any more.
    """
    held = [getattr(module, "__dict__", {}).get("transformers") for module in list(sys.modules.values())]
    for package in (transformers, sys.modules["transformers"], *held):
        if isinstance(package, ModuleType) and package.__name__ == "transformers":
            for kind in KINDS:
                setattr(package, kind.__name__, kind)


KINDS = (EnsembleForCausalLM, EnsembleForSeq2SeqLM, EnsembleForSequenceClassification, EnsembleOverBytes)
"""The classes that a configuration may name."""

name_classes()
