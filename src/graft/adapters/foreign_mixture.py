"""`{peft: {peft_type: XLORA, adapters: {…}}}`: peft's settings as a point of graft's, and its experts brought in.

An expert is a folder of graft's with one LoRA adapter, or peft's of a LoRA. All of it becomes adapters of graft's own,
so that what is saved is whole: the experts, under the names that they have in `adapters`, and the classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.adapters.point import Mixture, Point
from graft.errors import RequestError, SettingsError
from graft.settings import parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KIND = "XLORA"

NAMES = {
    "xlora_depth": "depth", "xlora_size": "width", "xlora_dropout_p": "dropout", "layerwise_scalings": "layerwise",
    "enable_softmax": "softmax", "softmax_temperature": "temperature", "top_k_lora": "top_k",
    "enable_softmax_topk": "top_k_softmax", "scaling_pass_value": "first_pass", "global_scaling_weight": "weight",
    "use_trainable_adapters": "train_experts",
}  # fmt: skip
"""What peft calls the settings of a mixture, and what graft does."""


def expert_names(settings: Mapping[str, Any]) -> dict[str, str] | None:
    """What peft's settings call their experts, and the model or folder that each is; None for other types than X-LoRA.

    Raises ValueError for experts that are named otherwise than peft names them.
    """
    if str(settings.get("peft_type")).upper() != KIND:
        return None
    experts = settings.get("adapters")
    wish = "peft: XLORA expected `adapters`, two LoRA adapters or more by name, {prose: MODEL, code: MODEL}"
    if not isinstance(experts, Mapping) or not all(isinstance(ref, str) for ref in experts.values()):
        raise ValueError(f"{wish}, found {experts!r}")
    if len(experts) < 2 or any(not str(name) or "." in str(name) for name in experts):
        raise ValueError(f"{wish}, without dots in their names, found {', '.join(map(str, experts)) or 'none'}")
    return {str(name): ref for name, ref in experts.items()}


def mixture_point(settings: Mapping[str, Any]) -> Point:
    """The point that peft's settings name. Raises RequestError for values that are none of it."""
    given = {ours: settings[theirs] for theirs, ours in NAMES.items() if theirs in settings}
    try:
        names = expert_names(settings) or {}
        mixture = parse(Mixture, given)
    except SettingsError as error:
        theirs = {ours: name for name, ours in NAMES.items()}
        wrong = "; ".join(f"{theirs.get(str(p.path[-1]), '')}: {p.message}" for p in error.problems)
        raise RequestError(f"peft: XLORA does not take these settings: {wrong}") from None
    except ValueError as error:
        raise RequestError(str(error)) from None
    return Point(form="mixture", on=["adapters"], of=list(names), mixture=mixture)


def peft_settings(point: Point, channels: int) -> dict[str, Any]:
    """The same as peft has it, without its experts."""
    how = (point.mixture or Mixture()).plain()
    return {"peft_type": KIND, "hidden_size": channels, **{theirs: how[ours] for theirs, ours in NAMES.items()}}


def put_mixture(
    model: PreTrainedModel, settings: Mapping[str, Any], base: Path | None, name: str, folders: Mapping[str, Path]
) -> PreTrainedModel:
    """Put the experts and a fresh classifier, called `name`, into `model` (in place), which alone is trainable.

    `folders`: where the models lie that the settings name, if not where they say. Raises RequestError for an expert
    that is no LoRA adapter, CheckpointError for one that was made for another model.
    """
    from graft.adapters.experts import add_expert

    point = mixture_point(settings)
    for one, ref in (expert_names(settings) or {}).items():
        add_expert(model, folders.get(ref, Path(ref)), one, base)
    return _with_classifier(model, point, settings, base, name)


def put_points(model: PreTrainedModel, settings: Mapping[str, Any], experts: Mapping[str, Sequence[Point]]) -> Any:
    """Put fresh experts of these points into `model` (in place), by name, and a classifier of them."""
    from graft.adapters.stack import adopt

    point = mixture_point(settings)
    for one in point.of:
        adopt(model, experts[one], one)
    return _with_classifier(model, point, settings, None, "adapter")


def _with_classifier(
    model: PreTrainedModel, point: Point, settings: Mapping[str, Any], base: Path | None, name: str
) -> PreTrainedModel:
    from graft.adapters.stack import adopt, free_name

    stack = adopt(model, [point], own := free_name(name, point.of), base=base)
    channels, said = stack.sites[own]["classifier"].channels, settings.get("hidden_size")
    if said is not None and said != channels:
        raise RequestError(
            f"peft: XLORA expected a `hidden_size` of {channels}, that of the last hidden states, found {said}: leave "
            "it out"
        )
    return model
