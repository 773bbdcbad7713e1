"""The parents' parameters under the names that the model itself has for them, and back to the names of its files.

Most models store their parameters as they are. Some are converted while they load: the experts of a layer become one
parameter, or a name has changed. Of those a copy is written into the scratch under the model's own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from graft.checkpoint import FLOATS, TensorReader, TensorWriter
from graft.errors import CannotCombine
from graft.merge._kept import kept, made_of
from graft.merge._layers import Layers
from graft.merge._reading import load
from graft.merge.candidates import check_parents
from graft.merge.inputs import inputs
from graft.merge.preflight import layout
from graft.merge.settings import MergeSettings
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Parameters:
    """Reads a parameter of any parent; `.model` is the first of them, loaded."""

    def __init__(self, job: Job, settings: MergeSettings, opened: ExitStack):
        check_parents(job)
        plan = layout(settings, job.models)
        first = settings.parents[0]
        self.model = load(job, settings, first)
        self.layers = Layers.of(self.model)
        floats = {name: places for name, places in plan.places.items() if plan.tensors[name][0] in FLOATS}
        self.outputs = parameters_of(self.layers, {name: places[first] for name, places in floats.items()}, first)
        """Tensor of the output → the parameter that it is (a part of)."""
        self.stored: dict[str, Mapping[str, str]] = {self.outputs[name]: places for name, places in floats.items()}
        """Parameter → parent → name of the tensor there; one of several where it is stored in parts."""
        parents = inputs(settings, job.models)
        self._names = self.stored
        if self.layers.converted:
            self._names = {parameter: dict.fromkeys(parents, parameter) for parameter in self.stored}
            copies = {name: _copied(job, settings, name) for name in parents}
            self._readers = {name: opened.enter_context(TensorReader(copy)) for name, copy in copies.items()}
        else:
            self._readers = {name: opened.enter_context(parent.open()) for name, parent in parents.items()}

    def read(self, parameter: str, name: str) -> Tensor:
        """A parameter of one parent, float32, in its shape."""
        return self._readers[name].read(self._names[parameter][name]).float()

    def source(self, parameter: str, name: str) -> tuple[TensorReader, str]:
        """Where a parameter of one parent lies."""
        return self._readers[name], self._names[parameter][name]


def _copied(job: Job, settings: MergeSettings, name: str) -> Path:
    """A folder with a parent's parameters under the model's own names, float32."""

    def make(folder: Path) -> None:
        found = dict(load(job, settings, name).named_parameters())
        writer = TensorWriter(folder, {parameter: ("F32", tuple(value.shape)) for parameter, value in found.items()})
        for parameter, value in found.items():
            writer.write(parameter, 0, value.detach().cpu().numpy().reshape(-1).data)
        writer.close()

    return kept(job, f"parameters/{settings.parents.index(name)}", made_of(job, settings, [name]), make)


def parameters_of(layers: Layers, stored: Mapping[str, str], model: str) -> dict[str, str]:
    """The parameter that each stored tensor (the values of `stored`) is (a part of), by its key.

    Raises CannotCombine for one that is none.
    """
    found = {key: layers.parameter(name) for key, name in stored.items()}
    if unknown := [key for key, parameter in found.items() if parameter is None]:
        raise CannotCombine(
            f"expected the tensors of {model} to be parameters of its class, found {len(unknown)} that transformers "
            f"makes nothing of that is known ({', '.join(unknown[:3])}): use a method without data"
        )
    return {key: parameter for key, parameter in found.items() if parameter is not None}


def as_stored(
    model: PreTrainedModel, layers: Layers, values: Mapping[str, Tensor], stored: Iterable[str], name: str
) -> dict[str, Tensor]:
    """Values of parameters (in their shapes) as the tensors that a folder of the model `name` stores."""
    from transformers.core_model_loading import revert_weight_conversion

    parameters = parameters_of(layers, {tensor: tensor for tensor in stored}, name)
    if not layers.converted:
        return {tensor: values[parameter] for tensor, parameter in parameters.items()}
    apart = revert_weight_conversion(model, dict(values))
    places = {tensor: next((n for n in (tensor, layers.prefix + tensor) if n in apart), None) for tensor in parameters}
    return {tensor: values[parameters[tensor]] if at is None else apart[at] for tensor, at in places.items()}
