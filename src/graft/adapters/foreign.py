"""Adapters of peft's own types, which graft has no point for: peft computes, graft trains, saves and loads them."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.adapters.foreign_ranks import NAME, Ranks, expect_ranks, note_ranks, with_steps
from graft.adapters.foreign_tasks import RowTasks, is_tasked, tell_tasks
from graft.adapters.packed import is_packed
from graft.adapters.places import call_briefly
from graft.disk import disk_errors
from graft.errors import CheckpointError, MissingExtra, RequestError, nearest
from graft.models import no_bars

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

HOLDER = "graft_peft"
"""The attribute of a model that holds peft's wrapper around it, and the folder of its frozen weights."""

RANKED = "ADALORA"
"""The type that loses ranks while it is trained."""

CONTINUING = "CPT"
"""The type that is for decoders alone, and wants to be told so."""

MIXED = "XLORA"
"""The type that mixes adapters that are there already."""


class Held(NamedTuple):
    """What a model with peft's adapter holds: peft's wrapper around it, the folder of the frozen weights, peft's
    settings, the tasks of its rows where the adapter mixes by them, and the parameters that peft trains."""

    wrapper: Any
    base: Path | None
    said: dict[str, Any]
    tasks: RowTasks | None
    trained: frozenset[str]


def peft_config(settings: Mapping[str, Any]) -> Any:
    """peft's configuration object. Raises MissingExtra without peft, RequestError for what it does not take."""
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra("peft", "peft", "the method peft")
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    plain = dict(settings)
    kind = str(plain.pop("peft_type", "")).upper()
    known = {str(getattr(name, "value", name)): cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        there, found = ", ".join(sorted(known)), f"{kind!r}{nearest(kind, known)}" if kind else "none"
        raise RequestError(f"expected a `peft_type` that peft has, found {found}; there are: {there}")
    options = [field.name for field in fields(known[kind]) if field.init]
    if unknown := next((name for name in plain if name not in options), None):
        raise RequestError(
            f"peft: {kind} has no setting {unknown!r}{nearest(unknown, options)}; there are: {', '.join(options)}"
        )
    if kind == MIXED:
        plain.setdefault("hidden_size", 1)  # peft would warn; it is the model that tells
    if kind == CONTINUING:
        plain.setdefault("task_type", "CAUSAL_LM")
    try:
        return known[kind](**(with_steps(plain) if kind == RANKED else plain))
    except (TypeError, ValueError) as error:
        raise RequestError(f"peft: {kind} does not take these settings: {error}") from None


def wrap(
    model: PreTrainedModel,
    settings: Mapping[str, Any],
    base: Path | None,
    name: str = "adapter",
    folders: Mapping[str, Path] | None = None,
) -> PreTrainedModel:
    """Put a fresh adapter of peft's into `model` (in place) and freeze everything else.

    Types that learn prompts become an adapter of graft's own, called `name`, which peft's modules feed; so does a
    mixture of experts, which lie in `folders`, by the names that the settings give. Raises RequestError for what peft
    refuses, and MissingExtra without peft.
    """
    config = peft_config(settings)
    from graft.adapters.stack import adapted_class, adapters_of

    if HOLDER in model.__dict__ or (adapters_of(model) is not None and not config.is_prompt_learning):
        raise RequestError(
            "an adapter of peft's stands alone: expected a model without adapters, found one that has some"
        )
    try:
        if config.is_prompt_learning:
            from graft.adapters.foreign_prompts import put_prompts

            return put_prompts(model, config, base, name)
        if _kind(config) == MIXED:
            from graft.adapters.foreign_mixture import put_mixture

            return put_mixture(model, settings, base, name, folders or {})
        from peft import get_peft_model

        with warnings.catch_warnings():  # what peft asks of transformers is peft's affair
            warnings.simplefilter("ignore", FutureWarning)
            wrapper = get_peft_model(model, config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RequestError(f"peft: {error}") from error
    said = dict(settings)
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.__dict__[HOLDER] = Held(wrapper, base, said, tell_tasks(wrapper) if is_tasked(said) else None, trained)
    _check_packed(model, config)
    if _is_ranked(wrapper):
        model.add_module(NAME, Ranks(wrapper, said))
    model.__class__ = adapted_class(type(model))  # type: ignore[arg-type]
    return model


def _is_ranked(wrapper: Any) -> bool:
    return hasattr(wrapper.base_model, "rankallocator")


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _check_packed(model: PreTrainedModel, config: Any) -> None:
    """Raises RequestError where a type that computes with weights as they lie was put on packed ones, by trying."""
    if not any(is_packed(module) for module in model.modules()):
        return
    try:
        call_briefly(model)
    except RuntimeError as error:
        raise RequestError(
            f"peft: {_kind(config)} does not compute with packed weights ({error}): use the method lora or ia3, "
            "or unpack the model first ({quantize: {from: …, bits: 16}})"
        ) from None


def tried(config: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """What is wrong with peft's settings for the model of this configuration, and how many numbers they train.

    Tried on the model's skeleton; nothing and None where that cannot be.
    """
    from graft.adapters.trial import skeleton

    model = skeleton(config)
    if model is None:
        return [], None
    try:
        made = wrap(model, settings, None)
    except RequestError as error:
        # a type that starts from the weights' values cannot on a skeleton, which has none ("meta" tensors)
        blind = isinstance(error.__cause__, NotImplementedError) and "meta" in str(error.__cause__)
        return [] if blind else [str(error)], None
    except (RuntimeError, AttributeError, KeyError):  # a type that cannot be tried without weights
        return [], None
    return [], sum(p.numel() for p in made.parameters() if p.requires_grad)


def foreign_base(model: PreTrainedModel) -> Path | None:
    """The folder of the frozen weights below an adapter of peft's; None where it is not known or there is none."""
    held = model.__dict__.get(HOLDER)
    return held.base if held else None


def train_foreign(model: PreTrainedModel) -> bool:
    """Let peft's adapter in `model`, and nothing else, be trained, as a fresh one is; whether there is one.

    Raises RequestError for AdaLoRA, of which only the ranks that are left were saved.
    """
    held = model.__dict__.get(HOLDER)
    if held is None:
        return False
    if _is_ranked(held.wrapper):
        raise RequestError(
            "peft: ADALORA has given its ranks away, and an adapter that is loaded has those alone that were left: "
            "fold it (`fold: true`) and train an adapter on what comes out"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in held.trained)
    return True


def tasks_of(model: Any) -> RowTasks | None:
    """The tasks that an adapter of peft's mixes by in `model`; None where it has no such adapter."""
    held = model.__dict__.get(HOLDER)
    return held.tasks if held else None


def foreign_said(model: PreTrainedModel) -> dict[str, Any]:
    """What `config.json` is to say."""
    held = model.__dict__[HOLDER]
    tasks = {} if held.tasks is None else {"tasks": held.tasks.said()}
    return {"adapters": {}, "active": [], "peft": held.said, **tasks}


def foreign_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The adapter's weights, by peft's names."""
    wrapper = model.__dict__[HOLDER].wrapper
    if _is_ranked(wrapper):
        note_ranks(wrapper)
    return _weights(wrapper)


def _weights(wrapper: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(wrapper)  # layers may share what they have: a file wants it of each
    return {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}


def load_foreign(
    model: PreTrainedModel, entry: Mapping[str, Any], weights: Mapping[str, torch.Tensor], base: Path
) -> PreTrainedModel:
    """`model` with the adapter that `entry` tells of, as `foreign_said` does, frozen.

    Raises CheckpointError where weights are missing or belong nowhere, or tasks are damaged.
    """
    from peft import set_peft_model_state_dict

    settings = entry["peft"]
    wrapper, _, _, tasks, _ = wrap(model, settings, base).__dict__[HOLDER]
    if tasks is not None and "tasks" in entry:
        tasks.take(entry["tasks"], base)
    if _is_ranked(wrapper):
        expect_ranks(wrapper, weights)
    expected = set(_weights(wrapper))
    if expected != set(weights):
        missing = ", ".join(sorted(expected ^ set(weights))[:4])
        raise CheckpointError(f"{base}: expected the weights of {settings.get('peft_type')}, found others: {missing}")
    set_peft_model_state_dict(wrapper, dict(weights))
    model.requires_grad_(False)
    return model


def save_foreign(model: PreTrainedModel, folder: Path) -> None:
    """Write peft's adapter as peft does; it names the frozen model's folder."""
    wrapper, base, *_ = model.__dict__[HOLDER]
    if _is_ranked(wrapper):
        note_ranks(wrapper)
    for config in wrapper.peft_config.values():
        config.base_model_name_or_path = str(base.resolve()) if base else None
    with disk_errors(folder):
        wrapper.save_pretrained(folder)


def save_foreign_folded(model: PreTrainedModel, folder: Path) -> None:
    """Write the model with peft's adapter merged in. Raises RequestError for types that cannot be."""
    from graft.adapters.stack import Adapted

    wrapper = copy.deepcopy(model.__dict__[HOLDER].wrapper)
    try:
        whole = wrapper.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise RequestError(f"peft's adapter does not fold: {error}; say `fold: false`") from None
    whole.__class__ = next(cls for cls in type(whole).__mro__ if not issubclass(cls, Adapted))
    with no_bars():
        whole.save_pretrained(folder)
