"""peft's folder of an X-LoRA: the classifier, and each expert in a folder of its own in it, `0`, `1`, ….

peft runs experts only under such names, reads them where the configuration says (their whole path, so that a folder
that was moved needs `config.adapters` set anew), and wants `use_cache` False in the model's settings. What it saves
(0.21) lacks the layers of the classifier whose number is also the name of an expert: they are in a folder of that
name, beside weights of the base, and are found there; the experts are where they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft.adapters.foreign_mixture import KIND, mixture_point, peft_settings
from graft.adapters.mixture import Mixer
from graft.adapters.peft_files import WEIGHTS, read_settings, read_weights
from graft.adapters.stack import Adapters, adopt, free_name
from graft.checkpoint import read_file_headers
from graft.errors import CheckpointError, RequestError
from graft.lora import START, is_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLASSIFIER = "internal_xlora_classifier.layers."
PREFIX = f"base_model.{CLASSIFIER}"

AdoptOne = Callable[..., Adapters]


def read_mixture(
    model: PreTrainedModel, config: Mapping[str, Any], folder: Path, name: str, base: Path | None, adopt_one: AdoptOne
) -> tuple[Adapters, Mixer, dict[str, torch.Tensor]]:
    """Put the experts of peft's folder and a fresh classifier into `model` (in place).

    `adopt_one` puts the adapter of another peft folder there. Returns the stack, the classifier, its weights by name.
    Raises RequestError where an expert is not to be found, CheckpointError where weights of the classifier are missing.
    """
    point = mixture_point(config)
    for one in point.of:
        adopt_one(model, _expert(folder, one, str(config["adapters"][one])), one, base=base)
    stack = adopt(model, [point], own := free_name(name, point.of), base=base)
    mixer = stack.sites[own]["classifier"]
    return stack, mixer, _classifier(folder, mixer)


def experts_of(folder: Path) -> list[Path]:
    """Where the experts of peft's folder lie; none where it is no mixture. Raises RequestError for one that is lost."""
    config = read_settings(folder)
    if config.get("peft_type") != KIND:
        return []
    return [_expert(folder, name, str(said)) for name, said in (config.get("adapters") or {}).items()]


def _expert(folder: Path, name: str, said: str) -> Path:
    """Where an expert lies: in the mixture's folder, or where that says."""
    places = [folder / name, folder / said, Path(said)]
    for place in places:
        if is_lora(place) and (place / WEIGHTS).is_file() and _holds_lora(place):
            return place
    raise RequestError(
        f"{folder}: expected the expert {name}, a peft folder of a LoRA, at one of {', '.join(map(str, places))}, "
        f"found none: copy it to {places[0]}"
    )


def _holds_lora(folder: Path) -> bool:
    names = read_file_headers(folder / WEIGHTS)
    return bool(names) and all(name.startswith(START) and ".lora_" in name for name in names)


def _classifier(folder: Path, mixer: Mixer) -> dict[str, torch.Tensor]:
    """The classifier's weights as they lie in peft's folder, by the names that they have here."""
    raw = read_weights(folder)
    found = {key.partition(CLASSIFIER)[2]: value for key, value in raw.items() if CLASSIFIER in key}
    missing = [key.removeprefix("layers.") for key in mixer.state_dict() if key.removeprefix("layers.") not in found]
    for key in missing:
        number, _, part = key.partition(".")
        inside = folder / number
        astray = read_weights(inside).get(PREFIX + part) if (inside / WEIGHTS).is_file() else None
        if astray is None:
            raise CheckpointError(
                f"{folder}: expected the classifier's weights {PREFIX}{key}, found none: peft 0.21 does not save them "
                "for experts of some names; save it with graft, or with another version of peft"
            )
        found[key] = astray
    return {f"layers.{key}": value for key, value in found.items()}


def written(mixer: Mixer, place: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(configuration, weights) as peft has them, for experts in the folders `0`, `1`, … in `place`."""
    experts = {str(number): str(place.resolve() / str(number)) for number in range(mixer.experts)}
    config = {**peft_settings(mixer.point, mixer.channels), "adapters": experts}
    weights = {re.sub(r"^layers\.", PREFIX, key): value for key, value in mixer.state_dict().items()}
    return config, weights
