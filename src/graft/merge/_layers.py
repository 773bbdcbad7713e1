"""Which stored tensors are the weights of linear layers: found from the types of a model's modules, not from names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graft.merge._experts import Experts, experts_of

if TYPE_CHECKING:
    from torch import nn

    from graft.merge.prepared import Prepared
    from graft.merge.settings import MergeSettings
    from graft.merge.stream import Tensors
    from graft.verb import Job

TABLES = ("embed", "wte", "wpe", "shared", "position")
"""What the names of tables that are looked up in hold, where a model of this kind cannot be built and asked."""


@dataclass(frozen=True)
class Layers:
    """The parameters of a model and which of them are the weights of linear layers."""

    linear: Mapping[str, bool]
    """Parameter → whether it is kept as [in, out] (Conv1D), not as [out, in]. One tied to an embedding is left out."""
    parameters: frozenset[str]
    tied: Mapping[str, str]
    """Parameter → the one that it is the same as."""
    prefix: str
    """What checkpoints of the model without its head leave out before names."""
    converted: Mapping[str, str]
    """Stored tensor → the parameter that it is, or is a part of, where transformers converts it on loading."""
    experts: Mapping[str, Experts] = field(default_factory=dict)
    """Parameter → the experts whose weights it holds, a matrix each."""

    @classmethod
    def of(cls, model: nn.Module) -> Layers:
        """Those of a `transformers` model, with or without memory behind its weights."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        linear = {
            f"{name}.weight": isinstance(module, Conv1D)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and id(module.weight) not in tables
            and not {f"{name}.weight"} & {*tied, *tied.values()}
        }
        names = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        return cls(linear, names, tied, prefix, _converted(model, names), experts_of(model))

    def parameter(self, stored: str) -> str | None:
        """The parameter that a stored tensor is, or is a part of, whatever its prefix; None: it is none."""
        for name in (stored, self.prefix + stored):
            if name in self.converted:
                return self.converted[name]
            if name in self.parameters:
                return self.tied.get(name, name)
        return None

    def transposed(self, stored: str) -> bool | None:
        """Whether the weight of a linear layer is kept as [in, out]; None: it is not a linear layer's."""
        return self.linear.get(self.parameter(stored) or "")


def _converted(model: nn.Module, parameters: frozenset[str]) -> dict[str, str]:
    """Tensors that are stored under another name than the parameter's, or as one of its parts."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel) or not get_model_conversion_mapping(model, add_legacy=False):
        return {}
    found = {}
    for name, value in model.named_parameters():
        for stored in revert_weight_conversion(model, {name: value.detach().to("meta")}):
            found[stored] = name
    return {stored: name for stored, name in found.items() if stored not in parameters}


def layers_of(folder: Path) -> Layers | None:
    """The layers of the model in a folder, built without memory; None where this `transformers` does not know it."""
    from graft.merge.architecture import empty_model

    model = empty_model(folder)
    return Layers.of(model) if model is not None else None


def orientation(tensors: Tensors, layers: Layers | None) -> bool | None:
    """Whether a tensor is a linear layer's weight kept as [in, out]; None: it is a bias, a norm, a table or no matrix.

    Where the model is not known, or converts the tensor on loading, a matrix counts unless its name says that it is a
    table.
    """
    if len(tensors.shape) != 2 or 0 in tensors.shape:
        return None
    stored = (tensors.base or tensors.models[0]).name
    if layers is not None and stored not in layers.converted:
        return layers.transposed(stored)
    return None if any(word in tensors.name for word in TABLES) else False


def prepare_layers(job: Job, settings: MergeSettings) -> Prepared:
    """What a method on matrices finds out beforehand: which tensors are linear layers' weights."""
    from graft.merge.inputs import inputs
    from graft.merge.prepared import Prepared

    layers = layers_of(inputs(settings, job.models)[settings.parents[0]].home)
    how = "module types" if layers is not None else "names: this version of transformers does not know the architecture"
    return Prepared(settings, {"linear_layers_found_by": how}, layers)
