"""Heads on the body of a model: ordinary models of `transformers` that share all of its modules below the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "tagging": "AutoModelForTokenClassification",
    "spans": "AutoModelForQuestionAnswering",
}
"""Kind of a head → the Auto class of `transformers` that knows its class for each architecture."""


def class_for(kind: str, config: Any) -> Any:
    """The class of `transformers` with a head of this kind on the architecture of `config`.

    Raises RequestError for an architecture that has none, naming the kinds it has.
    """
    known = [name for name in AUTO if _known(name, config) is not None]
    found = _known(kind, config)
    if found is None or getattr(config, "is_encoder_decoder", False):
        there = "" if getattr(config, "is_encoder_decoder", False) else f" ({', '.join(known)})" * bool(known)
        raise RequestError(
            f"expected an architecture with a head for {kind}, found {config.model_type}: give the task `head: text`, "
            f"which every model has, or one of the heads it has{there}"
        )
    return found


def _known(kind: str, config: Any) -> Any:
    import transformers

    mapping = getattr(transformers, AUTO[kind])._model_mapping
    return mapping.get(type(config), None)


def add_head(
    model: PreTrainedModel, kind: str, labels: Sequence[str], tokenizer: PreTrainedTokenizerFast | None = None
) -> PreTrainedModel:
    """A model with a fresh head of this kind that shares the body of `model`, its modules and parameters themselves.

    Modules beside the body that both have (such as the transformation before the scores in ModernBERT) start as
    copies of those in `model`. `labels`: classes or tags; none for spans. Draws from torch's generator.
    Raises RequestError where the body is of another class than the head needs.
    """
    config = _config(model.config, labels, tokenizer)
    made = class_for(kind, config)._from_config(config, dtype=torch.float32)
    body, own = model.base_model, made.base_model
    if body is model or type(body) is not type(own):
        raise RequestError(
            f"expected a model whose body a {type(made).__name__} can take, found {type(model).__name__}: give the "
            "task `head: text`"
        )
    for name, child in own.named_children():
        if getattr(body, name, None) is None:
            setattr(body, name, child.to(model.device))  # what only heads need, such as a pooler
    setattr(made, made.base_model_prefix, body)
    for child in (child for child in made.children() if child is not body):  # a packed body is not moved
        child.to(model.device)
    _copy_alike(model, made)
    return made.train(model.training)


def _config(config: Any, labels: Sequence[str], tokenizer: PreTrainedTokenizerFast | None) -> Any:
    """That of the model, with labels, and a padding token, which says where a text ends."""
    plain = {name: value for name, value in config.to_dict().items() if name not in ("architectures", "graft_adapted")}
    made = type(config).from_dict(plain)
    if labels:
        made.id2label = dict(enumerate(labels))
        made.label2id = {label: number for number, label in enumerate(labels)}
    if made.pad_token_id is None and tokenizer is not None:
        pad = tokenizer.pad_token_id
        made.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    return made


@torch.no_grad()
def _copy_alike(model: nn.Module, made: nn.Module) -> None:
    """Parameters beside the body that have one name and shape in both."""
    known = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        if name in known and known[name] is not parameter and known[name].shape == parameter.shape:
            parameter.copy_(known[name])
