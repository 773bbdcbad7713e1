"""Folders of graft's own adapters, with random weights, on the models of `small_family`."""

from pathlib import Path

import torch
from small_family import save, tokenizer

from graft.adapters import Point, adapters_of, adopt, fold
from graft.methods import method
from graft.models import load
from graft.settings import parse


def named(name, **options):
    """The points of a method of `tune`."""
    module = method("graft.tune", name)
    return module.points(parse(module.Settings, options))


def points(*settings):
    """Points as a recipe writes them."""
    return [parse(Point, one) for one in settings]


def own(base, folder, *adapters, active=None, seed=0):
    """A folder with these adapters (each a list of points) on the model in `base`, all trained weights at random."""
    model = load(base)
    generator = torch.Generator().manual_seed(seed)
    for number, each in enumerate(adapters):
        stack = adopt(model, each, f"adapter-{number}", base=base)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    stack.use(active or list(stack.points))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Path(folder)


def folded(folder):
    """What folding makes of an adapter and its model: tensors by name."""
    model = load(folder)
    assert adapters_of(model) is not None
    return {name: weight.detach().clone() for name, weight in fold(model).state_dict().items()}


def save_folded(folder, out):
    """The model with the adapter folded in, as a folder."""
    return save(fold(load(folder)), out)
