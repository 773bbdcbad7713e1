"""Gram matrices of the inputs of linear layers: gathered while a model reads, kept in files, read one at a time.

A Gram matrix has inputs² numbers. As many of them are gathered in one pass over the data as BUDGET allows; layers that
get the same input share one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.checkpoint import Headers, TensorHeader, TensorReader, TensorWriter
from graft.errors import CannotCombine
from graft.merge._experts import Experts, are_experts, inputs_of, number_of
from graft.merge._kept import kept, made_of
from graft.merge._layers import Layers, layers_of
from graft.merge._reading import batches, device_of, load, real, rows_for, what_is_read
from graft.merge.candidates import check_parents
from graft.merge.inputs import inputs
from graft.merge.prepared import Prepared
from graft.merge.regmean import RegressionSettings
from graft.merge.stream import Source
from graft.products import quick_layers
from graft.progress import Progress
from graft.train.attention import model_inputs
from graft.verb import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUDGET = 2 << 30
"""Bytes of Gram matrices that are gathered in one pass."""
ROWS = 4
"""Rows that a model reads at once."""
PLACES = "grams.json"


@dataclass(frozen=True)
class Gram:
    """Where a Gram matrix [in, in] float32 lies, and whether its layer's weight is kept as [in, out].

    Of experts in one parameter there is one each, [experts, in, in]; `expert` says whose a tensor is that holds one's.
    """

    reader: TensorReader
    name: str
    transposed: bool
    expert: int | None = None

    def read(self) -> Tensor:
        """The matrix for the tensor; of a tensor that holds all experts, all of them."""
        if self.expert is None:
            return self.all()
        wide = self.reader.headers[self.name].shape[-1]
        return self.reader.read(self.name, self.expert * wide**2, wide**2).view(wide, wide)

    def all(self) -> Tensor:
        """The matrix for the parameter; all experts' where it holds several."""
        return self.reader.read(self.name)


class Grams:
    """The Gram matrices of all models, in the folders that `write` has made."""

    def __init__(self, folders: Mapping[str, Sequence[Path]]):
        self._found: dict[tuple[str, str], Gram] = {}
        self._readers: list[TensorReader] = []
        for model, parts in folders.items():
            for folder in parts:
                self._add(model, folder)

    def _add(self, model: str, folder: Path) -> None:
        reader = TensorReader(folder)
        self._readers.append(reader)
        for stored, place in json.loads((folder / PLACES).read_text()).items():
            self._found[model, stored] = Gram(reader, *place)

    def of(self, source: Source) -> Gram | None:
        """The Gram matrix for a tensor of a model; None where it is not the weight of a linear layer."""
        return self.at(source.model, source.name)

    def at(self, model: str, stored: str) -> Gram | None:
        """The same, by the name that a model stores the tensor under."""
        return self._found.get((model, stored))

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers:
            reader.close()


@dataclass
class Gatherer:
    """`sum xᵀ x` over the inputs of linear layers, by the name of the first layer that gets an input."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    """Layer → the layer whose Gram matrix is its own, too."""
    counts: dict[str, int] = field(default_factory=dict)
    mask: Tensor | None = None
    """[batch, length] bool: places that count."""
    _last: tuple[Tensor, str] | None = None

    def add(self, layer: str, inputs: Tensor) -> None:
        """What a layer was given: [batch, length, in], or [any, in] where a model has chosen among the places."""
        x = inputs.detach()
        if layer not in self.shared:
            same = self._last is not None and self._last[0] is inputs
            self.shared[layer] = self._last[1] if same and self._last else layer
        if self.shared[layer] != layer:
            return
        self._last = (inputs, layer)
        x = x.reshape(-1, x.shape[-1])[self._counting(inputs)].float()
        if layer not in self.sums:
            self.sums[layer] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self.sums[layer].addmm_(x.T, x)
        self.counts[layer] = self.counts.get(layer, 0) + len(x)

    def add_experts(self, layer: str, experts: nn.Module, hidden: Tensor, chosen: Tensor) -> None:
        """What the experts in the parameter `layer` were given: the mean is over all tokens, so that one that few are
        sent to counts little beside that of a model that sends it many."""
        counting = self._counting(hidden.detach())
        x, to = hidden.detach().reshape(-1, hidden.shape[-1])[counting], chosen.reshape(-1, chosen.shape[-1])[counting]
        self.shared[layer] = layer
        self.counts[layer] = self.counts.get(layer, 0) + len(x)
        weight = experts.get_parameter(layer.rpartition(".")[2])
        if layer not in self.sums:
            wide = weight.shape[1 if experts.is_transposed else 2]
            self.sums[layer] = torch.zeros(len(weight), wide, wide, device=x.device)
        for expert, given in inputs_of(experts, layer.rpartition(".")[2], x, to):
            self.sums[layer][expert].addmm_(given.float().T, given.float())

    def _counting(self, x: Tensor) -> Tensor:
        """[n] bool: which of the inputs [..., in], end to end, are tokens and not padding."""
        if self.mask is not None and x.shape[:-1] in (self.mask.shape, (self.mask.numel(),)):
            return self.mask.flatten()
        return torch.ones(x.numel() // x.shape[-1], dtype=torch.bool, device=x.device)

    def means(self) -> dict[str, Tensor]:
        """The mean outer product of the inputs, by layer; one that nothing reached is left out."""
        return {layer: total / self.counts[layer] for layer, total in self.sums.items() if self.counts[layer]}

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, what the layers are given is added up."""

        def hook(layer: str) -> Callable[[nn.Module, Any, Any], None]:
            def see(module: nn.Module, inputs: Any, named: Any) -> None:
                if are_experts(module):
                    hidden, chosen = (*inputs, *named.values())[:2]
                    self.add_experts(layer, module, hidden, chosen)
                else:
                    self.add(layer, inputs[0])

            return see

        hooks = [module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer, module in layers.items()]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()
            self._last = None


def measured(job: Job, settings: RegressionSettings) -> Prepared:
    """The Gram matrices of all models. What cannot be merged is refused before that takes its time."""
    check_parents(job)
    folders = {name: _of_model(job, settings, name) for name in settings.names}
    return Prepared(settings, noted(folders), Grams(folders))


def noted(folders: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """For the manifest: how many tensors are merged by regression."""
    first = next(iter(folders.values()))
    return {"merged_by_regression": sum(len(json.loads((folder / PLACES).read_text())) for folder in first)}


def _of_model(job: Job, settings: RegressionSettings, name: str) -> list[Path]:
    """Folders with the Gram matrices of one model, a pass over its data each."""
    loaded: list[PreTrainedModel] = []
    folders = []
    for number, part in enumerate(parts(sizes_of(job, settings, name))):

        def make(folder: Path) -> None:
            if not loaded:
                loaded.append(load(job, settings, name))
            gathered = gather(job, settings, loaded[0], name, part)  # noqa: B023
            write(folder, gathered, Layers.of(loaded[0]), inputs(settings, job.models)[name].headers)

        made = made_of(job, settings, [name], layers=part, **what_is_read(settings, [name]))
        folders.append(kept(job, f"grams/{settings.names.index(name)}-{number}", made, make))
    return folders


def sizes_of(job: Job, settings: RegressionSettings, name: str) -> dict[str, int]:
    """How many numbers the Gram matrix of every linear layer of a model has (those of all experts in one parameter),
    by the parameter that is the weight; in the order of the model."""
    parent = inputs(settings, job.models)[name]
    layers = layers_of(parent.home)
    if layers is None:
        raise CannotCombine(f"expected a model that transformers can run, found that it does not know that of {name}")
    found = {}
    for header in parent.headers.values():
        parameter, transposed = layers.parameter(header.name) or "", layers.transposed(header.name)
        if transposed is not None:
            found[parameter] = header.shape[0 if transposed else 1] ** 2
        elif settings.experts and parameter in layers.experts:
            found[parameter] = layers.experts[parameter].numbers
    if not found:
        raise CannotCombine(f"expected linear layers in {name}, found none: use `linear`")
    return {layer: found[layer] for layer in (*layers.linear, *layers.experts) if layer in found}


def parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """The layers, in order, in parts whose Gram matrices take BUDGET bytes at most (or are one alone)."""
    made: list[list[str]] = []
    held = BUDGET
    for layer, numbers in sizes.items():
        if held + 4 * numbers > BUDGET:
            made.append([])
            held = 0
        made[-1].append(layer)
        held += 4 * numbers
    return made


def module_of(model: nn.Module, layer: str) -> nn.Module:
    """The module that has the parameter `layer`."""
    return model.get_submodule(layer.rpartition(".")[0])


def gather(
    job: Job, settings: RegressionSettings, model: PreTrainedModel, name: str, layers: Sequence[str]
) -> Gatherer:
    """What the layers of `model` are given while it reads the data of the model `name`."""
    gatherer = Gatherer()
    modules = {layer: module_of(model, layer) for layer in layers}
    rows = rows_for(job, settings, model, name)
    with (
        torch.no_grad(),
        quick_layers(),
        gatherer.watching(modules),
        Progress("reading", settings.tokens, "tokens") as progress,
    ):
        for batch in batches(settings, rows, ROWS, device_of(job)):
            gatherer.mask = real(batch)
            model(**model_inputs(model, batch), use_cache=False)
            progress.advance(int(gatherer.mask.sum()))
    return gatherer


def _of_expert(experts: Experts, header: TensorHeader) -> tuple[bool, int | None] | None:
    """(kept as [in, out], which expert) of a stored tensor that is a parameter of experts, or one's part of it."""
    if len(header.shape) == 3:
        return experts.transposed, None
    number = number_of(header.name)
    if len(header.shape) != 2 or number is None or number >= experts.count:
        return None
    return header.shape[1] != experts.inputs, number


def write(folder: Path, gathered: Gatherer, layers: Layers, headers: Headers) -> None:
    """Write Gram matrices, and which of a model's stored tensors each belongs to."""
    means = gathered.means()
    writer = TensorWriter(folder, {layer: ("F32", tuple(mean.shape)) for layer, mean in means.items()})
    for layer, mean in means.items():
        writer.write(layer, 0, mean.cpu().numpy().reshape(-1).data)
    writer.close()
    places: dict[str, tuple[Any, ...]] = {}
    for stored, header in headers.items():
        leader = gathered.shared.get(layers.parameter(stored) or "")
        if leader in means and leader in layers.experts:
            if (place := _of_expert(layers.experts[leader], header)) is not None:
                places[stored] = (leader, *place)
        elif leader in means:
            places[stored] = (leader, layers.transposed(stored))
    (folder / PLACES).write_text(json.dumps(places))
