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

from graft.checkpoint import Headers, TensorReader, TensorWriter
from graft.errors import CannotCombine
from graft.merge._kept import kept, made_of
from graft.merge._layers import Layers, layers_of
from graft.merge._reading import batches, device_of, load, real, rows_for, what_is_read
from graft.merge.candidates import check_parents
from graft.merge.inputs import inputs
from graft.merge.prepared import Prepared
from graft.merge.regmean import RegressionSettings
from graft.merge.stream import Source
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
    """Where a Gram matrix [in, in] float32 lies, and whether its layer's weight is kept as [in, out]."""

    reader: TensorReader
    name: str
    transposed: bool

    def read(self) -> Tensor:
        """The matrix."""
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
        for stored, (name, transposed) in json.loads((folder / PLACES).read_text()).items():
            self._found[model, stored] = Gram(reader, name, transposed)

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
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask]
        x = x.reshape(-1, x.shape[-1]).float()
        if layer not in self.sums:
            self.sums[layer] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self.sums[layer].addmm_(x.T, x)
        self.counts[layer] = self.counts.get(layer, 0) + len(x)

    def means(self) -> dict[str, Tensor]:
        """The mean outer product of the inputs, by layer; one that nothing reached is left out."""
        return {layer: total / self.counts[layer] for layer, total in self.sums.items() if self.counts[layer]}

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, what the layers are given is added up."""

        def hook(layer: str) -> Callable[[nn.Module, Any], None]:
            return lambda _, inputs: self.add(layer, inputs[0])

        hooks = [module.register_forward_pre_hook(hook(layer)) for layer, module in layers.items()]
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
    for number, part in enumerate(parts(widths_of(job, settings, name))):

        def make(folder: Path) -> None:
            if not loaded:
                loaded.append(load(job, settings, name))
            gathered = gather(job, settings, loaded[0], name, part)  # noqa: B023
            write(folder, gathered, Layers.of(loaded[0]), inputs(settings, job.models)[name].headers)

        made = made_of(job, settings, [name], layers=part, **what_is_read(settings, [name]))
        folders.append(kept(job, f"grams/{settings.names.index(name)}-{number}", made, make))
    return folders


def widths_of(job: Job, settings: RegressionSettings, name: str) -> dict[str, int]:
    """The number of inputs of every linear layer of a model, by the parameter that is its weight."""
    parent = inputs(settings, job.models)[name]
    layers = layers_of(parent.home)
    if layers is None:
        raise CannotCombine(f"expected a model that transformers can run, found that it does not know that of {name}")
    found = {}
    for header in parent.headers.values():
        transposed = layers.transposed(header.name)
        if transposed is not None:
            found[layers.parameter(header.name) or ""] = header.shape[0 if transposed else 1]
    if not found:
        raise CannotCombine(f"expected linear layers in {name}, found none: use `linear`")
    return {layer: found[layer] for layer in layers.linear if layer in found}


def parts(widths: Mapping[str, int]) -> list[list[str]]:
    """The layers, in order, in parts whose Gram matrices take BUDGET bytes at most (or are one alone)."""
    made: list[list[str]] = []
    size = BUDGET
    for layer, wide in widths.items():
        if size + 4 * wide * wide > BUDGET:
            made.append([])
            size = 0
        made[-1].append(layer)
        size += 4 * wide * wide
    return made


def gather(
    job: Job, settings: RegressionSettings, model: PreTrainedModel, name: str, layers: Sequence[str]
) -> Gatherer:
    """What the layers of `model` are given while it reads the data of the model `name`."""
    gatherer = Gatherer()
    modules = {layer: model.get_submodule(layer.removesuffix(".weight")) for layer in layers}
    rows = rows_for(job, settings, model, name)
    with torch.no_grad(), gatherer.watching(modules), Progress("reading", settings.tokens, "tokens") as progress:
        for batch in batches(settings, rows, ROWS, device_of(job)):
            gatherer.mask = real(batch)
            model(**model_inputs(model, batch), use_cache=False)
            progress.advance(int(gatherer.mask.sum()))
    return gatherer


def write(folder: Path, gathered: Gatherer, layers: Layers, headers: Headers) -> None:
    """Write Gram matrices, and which of a model's stored tensors each belongs to."""
    means = gathered.means()
    writer = TensorWriter(folder, {layer: ("F32", tuple(mean.shape)) for layer, mean in means.items()})
    for layer, mean in means.items():
        writer.write(layer, 0, mean.cpu().numpy().reshape(-1).data)
    writer.close()
    places = {}
    for stored in headers:
        leader = gathered.shared.get(layers.parameter(stored) or "")
        if leader in means:
            places[stored] = (leader, layers.transposed(stored))
    (folder / PLACES).write_text(json.dumps(places))
