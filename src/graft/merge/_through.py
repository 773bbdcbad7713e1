"""Gram matrices of the inputs that layers get behind merged ones: the merged model grows a layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.errors import CannotCombine
from graft.merge._grams import ROWS, Gatherer, Grams, gather, module_of, noted, sizes_of, write
from graft.merge._kept import kept, made_of
from graft.merge._parameters import Parameters
from graft.merge._reading import batches, device_of, real, rows_for, what_is_read
from graft.merge.inputs import inputs
from graft.merge.prepared import Prepared
from graft.merge.regmean import RegressionSettings, regressed
from graft.products import quick_layers
from graft.progress import Progress
from graft.train.attention import model_inputs
from graft.verb import Job


class _Reached(Exception):
    """The layer that was asked for has been run: what comes behind it is of no use."""


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of layers that a model is a stack of, with its name: the one with the most parameters.

    Raises CannotCombine where there is none.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise CannotCombine(f"expected a stack of layers in {type(model).__name__}, found none: use `regmean`")
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))


class Growing:
    """The merged model as far as it is known: linear layers behind the last finished one are plain means."""

    def __init__(self, job: Job, settings: RegressionSettings, opened: ExitStack):
        self.job, self.settings = job, settings
        self._parameters = Parameters(job, settings, opened)
        self.model, self.layers = self._parameters.model, self._parameters.layers
        self.stored = self._parameters.stored
        self.parents = inputs(settings, job.models)
        self.share = [weight / sum(settings.weights) for weight in settings.weights]
        for parameter in self.stored:
            self.set(parameter, sum((s * w for s, w in zip(self.share, self.weights(parameter), strict=True)), 0.0))

    def weights(self, parameter: str) -> list[Tensor]:
        """A parameter in every model, float32, in its shape."""
        return [self.read(parameter, name) for name in self.settings.names]

    def read(self, parameter: str, name: str) -> Tensor:
        """A parameter of one model, float32, in its shape."""
        return self._parameters.read(parameter, name)

    def set(self, parameter: str, value: Tensor | float) -> None:
        """Give the merged model this value."""
        with torch.no_grad():
            self.model.get_parameter(parameter).copy_(torch.as_tensor(value))

    def merge(self, layers: Sequence[str], folders: Mapping[str, Path]) -> None:
        """Set linear layers to what the Gram matrices in the folders (one a model) say."""
        grams = Grams({name: [folder] for name, folder in folders.items()})
        for layer in layers:
            found = [grams.at(n, self.stored[layer][n]) for n in self.settings.names]
            if any(gram is None for gram in found):
                continue
            experts = self.layers.experts.get(layer)
            turned = self.layers.linear[layer] if experts is None else experts.transposed
            there = self.model.device
            read = [gram.all().to(there) for gram in found if gram is not None]
            self.set(layer, regressed([w.to(there) for w in self.weights(layer)], read, turned, self.settings))
        grams.close()


def measured(job: Job, settings: RegressionSettings) -> Prepared:
    """The Gram matrices of all models, each layer's behind merged ones; those a killed run has left are used again."""
    with ExitStack() as opened:
        growing = Growing(job, settings, opened)
        stack, blocks = blocks_of(growing.model)
        linear = [layer for layer in sizes_of(job, settings, settings.names[0]) if layer in growing.stored]
        folders: dict[str, list[Path]] = {name: [] for name in settings.names}
        with Progress("merging layers", len(blocks) + 1, "layers") as progress:
            for number in range(len(blocks)):
                own = [layer for layer in linear if layer.startswith(f"{stack}.{number}.")]
                _step(growing, own, folders, str(number), lambda name: _behind(growing, stack, number, own, name))  # noqa: B023
                progress.advance(1)
            rest = [layer for layer in linear if not layer.startswith(f"{stack}.")]
            _step(growing, rest, folders, "rest", lambda name: gather(job, settings, growing.model, name, rest))
    return Prepared(settings, noted(folders), Grams(folders))


def _step(
    growing: Growing, layers: Sequence[str], folders: dict[str, list[Path]], part: str, find: Callable[[str], Gatherer]
) -> None:
    """Measure some layers for every model, and merge them."""
    job, settings, found = growing.job, growing.settings, {}
    if not layers:
        return
    for place, name in enumerate(folders):

        def make(folder: Path) -> None:
            write(folder, find(name), growing.layers, growing.parents[name].headers)  # noqa: B023

        # layers before it are merged already, by these weights and this α
        merged = {"weights": settings.weights, "alpha": settings.alpha, **what_is_read(settings, settings.names)}
        made = made_of(job, settings, settings.names, model=name, part=part, **merged)
        found[name] = kept(job, f"through/{part}-{place}", made, make)
        folders[name].append(found[name])
    growing.merge(layers, found)


def _behind(growing: Growing, stack: str, number: int, layers: Sequence[str], name: str) -> Gatherer:
    """What a layer of the model `name` is given, and gives on inside itself, behind the merged layers before it."""
    block = growing.model.get_submodule(f"{stack}.{number}")
    own = copy.deepcopy(block)
    prefix = f"{stack}.{number}."
    with torch.no_grad():
        for parameter, value in own.named_parameters():
            if prefix + parameter in growing.stored:
                value.copy_(growing.read(prefix + parameter, name))
    gatherer = Gatherer()
    modules = {layer: module_of(own, layer.removeprefix(prefix)) for layer in layers}

    def instead(_: nn.Module, args: Any, kwargs: Any) -> None:
        own(*args, **kwargs)
        raise _Reached

    model, settings = growing.model, growing.settings
    rows = rows_for(growing.job, settings, model, name)
    handle = block.register_forward_pre_hook(instead, with_kwargs=True)
    with torch.no_grad(), quick_layers(), gatherer.watching(modules):
        for batch in batches(settings, rows, ROWS, device_of(growing.job)):
            gatherer.mask = real(batch)
            try:
                model(**model_inputs(model, batch), use_cache=False)
            except _Reached:
                continue
    handle.remove()
    return gatherer
