"""Which stored tensors are the weights of linear layers: found from the types of a model's modules, not from names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graft.errors import CannotCombine

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
        return cls(linear, names, tied, f"{getattr(model, 'base_model_prefix', '')}.")

    def parameter(self, stored: str) -> str | None:
        """The parameter that a stored tensor is, whatever its prefix; None: it is converted while it is loaded."""
        found = next((name for name in (stored, self.prefix + stored) if name in self.parameters), None)
        return self.tied.get(found, found) if found else None

    def transposed(self, stored: str) -> bool | None:
        """Whether the weight of a linear layer is kept as [in, out]; None: it is not a linear layer's."""
        return self.linear.get(self.parameter(stored) or "")


def layers_of(folder: Path) -> Layers | None:
    """The layers of the model in a folder, built without memory; None where this `transformers` does not know it."""
    from graft.merge.architecture import empty_model

    model = empty_model(folder)
    return Layers.of(model) if model is not None else None


def parameters_of(layers: Layers, stored: Iterable[str], model: str) -> dict[str, str]:
    """The parameter that each stored tensor is. Raises CannotCombine for one that is made into another on loading."""
    found = {name: layers.parameter(name) for name in stored}
    if unknown := [name for name, parameter in found.items() if parameter is None]:
        raise CannotCombine(
            f"expected the tensors of {model} to be parameters of its class, found {len(unknown)} that transformers "
            f"makes into others on loading ({', '.join(unknown[:3])}): use `regmean`, or a method without data"
        )
    return {name: parameter for name, parameter in found.items() if parameter is not None}


def orientation(tensors: Tensors, layers: Layers | None) -> bool | None:
    """Whether a tensor is a linear layer's weight kept as [in, out]; None: it is a bias, a norm, a table or no matrix.

    Where the model is not known, every matrix counts whose name does not say that it is a table.
    """
    if len(tensors.shape) != 2 or 0 in tensors.shape:
        return None
    if layers is not None:
        return layers.transposed((tensors.base or tensors.models[0]).name)
    return None if any(word in tensors.name for word in TABLES) else False


def prepare_layers(job: Job, settings: MergeSettings) -> Prepared:
    """What a method on matrices finds out beforehand: which tensors are linear layers' weights."""
    from graft.merge.inputs import inputs
    from graft.merge.prepared import Prepared

    layers = layers_of(inputs(settings, job.models)[settings.parents[0]].home)
    how = "module types" if layers is not None else "names: this version of transformers does not know the architecture"
    return Prepared(settings, {"linear_layers_found_by": how}, layers)
