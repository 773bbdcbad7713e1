"""Where in a model adapters go: blocks, their attention, feed-forward and linear layers, from types and names.

No architecture is known by name. Blocks are the elements of the outermost module lists that hold linear layers. What a
linear layer belongs to is told by the innermost module around it whose name or type says so: attention or feed-forward;
else by its own name. Roles follow from names (`q_proj`, `query`, `wq`) and sizes. A feed-forward of experts is one
module; what chooses between experts or tokens is no part of what it chooses for.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.adapters.fused_experts import Fused, fused_experts
from graft.adapters.naming import ATTENTION, CHOOSER, CHOOSING, FEED_FORWARD, Linear, block_linears
from graft.adapters.packed import is_packed
from graft.adapters.point import EXPERTS, LINEARS, ROLES, SUBLAYERS, Point, beyond, chosen
from graft.errors import RequestError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Place:
    """Where a site goes: x is the input of the module `source`, h the output of `target` (or its input: `before`).

    `path` names the place in files; `inputs` and `outputs` are the sizes of x and h.
    """

    path: str
    source: str
    target: str
    inputs: int
    outputs: int
    before: bool = False
    single: bool = False
    """Whether source and target are one linear layer: what folding needs."""
    parameter: str = ""
    """The parameter of fused experts, by its path in the target, where the place is one."""
    experts: int = 0
    turned: bool = False
    """Whether experts lie as [inputs, outputs]."""


class Layout:
    """What is where in a model. `stacks`: number of blocks of each stack, by the path of the list."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.modules = dict(model.named_modules())
        self.every = {path: module for path, module in self.modules.items() if _multiplies(module)}
        self.stacks: dict[str, int] = {}
        self.linears: list[Linear] = []
        self.width = width_of(model)
        for path, module in self.modules.items():
            inside = any(path.startswith(f"{stack}.") for stack in self.stacks)
            if isinstance(module, nn.ModuleList) and not inside and self._are_blocks(path, module):
                self.stacks[path] = len(module)
                for number in range(len(module)):
                    self.linears += block_linears(path, number, self.modules, self._sizes(path, number), self.width)
        self.named = {one.path: one for one in self.linears}

    def _are_blocks(self, path: str, module: nn.ModuleList) -> bool:
        below = [name for name in self.every if name.startswith(f"{path}.")]
        return bool(below) and all(any(name.startswith(f"{path}.{i}.") for name in below) for i in range(len(module)))

    def _sizes(self, stack: str, number: int) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of a block, by path."""
        start = f"{stack}.{number}."
        return {path: sizes(module) or (0, 0) for path, module in self.every.items() if path.startswith(start)}

    def places(self, point: Point) -> list[Place]:
        """Every place that the point names, in the model's order, each once.

        Raises RequestError for a word or pattern that nothing answers to, naming the candidates.
        """
        found: dict[str, Place] = {}
        deepest = max(self.stacks.values(), default=0)
        if self.stacks and beyond(point.layers, deepest):
            raise RequestError(
                f"{type(self.model).__name__}: expected layers of its blocks 0 to {deepest - 1}, found {point.layers}"
            )
        for word in point.on:
            here = self._first_there(word.split("|"), point)
            if not here:
                raise RequestError(self._nothing(word.split("|")[0]))
            found.update({place.path: place for place in here})
        return list(found.values())

    def _first_there(self, words: list[str], point: Point) -> list[Place]:
        """In each part of each block the places of the first of `words` that is there."""
        found: dict[Any, list[Place]] = {}
        for word in words:
            fresh: dict[Any, list[Place]] = {}
            for place in self._named(word, point):
                one = self.named.get(place.target)
                fresh.setdefault((one.stack, one.layer, one.part) if one else None, []).append(place)
            found = {**fresh, **found}
        return [place for places in found.values() for place in places]

    def _named(self, word: str, point: Point) -> Iterator[Place]:
        if word == "biases":
            yield from self._biases(point)
        elif word in SUBLAYERS:
            yield from self._sublayers(word, point)
        elif word == "intermediate":
            yield from self._named("before down", point)
        elif word.startswith("before "):
            for place in self._named(word.removeprefix("before "), point):
                if place.single:
                    yield Place(place.path, place.path, place.path, place.inputs, place.inputs, before=True)
        elif word in LINEARS:
            part = word.removesuffix("linears").removesuffix("_")
            yield from map(_single, self._wanted(point, lambda one: one.part == part if part else one.part != CHOOSING))
        elif word in ROLES:
            found = self._wanted(point, lambda one: one.role == word)
            yield from map(_single, found)
        elif word in EXPERTS:
            role = word.removeprefix("experts").removeprefix("_")
            yield from (_of_experts(one) for one in self._fused(point.layers) if not role or one.role == role)
        else:
            yield from self._patterned(word, point)

    def _wanted(self, point: Point, test: Callable[[Linear], bool]) -> list[Linear]:
        blocks = {stack: set(chosen(point.layers, count)) for stack, count in self.stacks.items()}
        return [one for one in self.linears if one.layer in blocks[one.stack] and test(one)]

    def _sublayers(self, part: str, point: Point) -> Iterator[Place]:
        """From what the first linear layer of a block's attention or feed-forward reads to what the last one gives."""
        for stack, count in self.stacks.items():
            for layer in chosen(point.layers, count):
                inside = [one for one in self.linears if (one.stack, one.layer, one.part) == (stack, layer, part)]
                found = list(self._spans(f"{stack}.{layer}.{part}", inside))
                yield from self._whole_feed_forwards(f"{stack}.{layer}", found) if part == "feed_forward" else found

    def _spans(self, name: str, inside: list[Linear]) -> Iterator[Place]:
        """A place for each attention, or feed-forward, that these linear layers of a block make up."""
        free = name
        for group in dict.fromkeys(one.group for one in inside):
            mates = [one for one in inside if one.group == group]
            last = next((one for one in mates if one.role in ("output", "down")), None)
            starts = [one for one in mates if one.inputs == self.width and one is not last]
            # in cross-attention only the query reads what the block does; some attention reads more than that
            asking = [one for one in (*starts, *mates) if one.role in ("query", "qkv")]
            first = next(iter((*asking, *starts)), None)
            if first is not None and last is not None:
                yield Place(free or f"{name}:{group}", first.path, last.path, first.inputs, last.outputs)
                free = ""

    def _whole_feed_forwards(self, block: str, spans: list[Place]) -> list[Place]:
        """The feed-forwards of a block: modules that hold experts, what no linear layers make up, and spans of such."""
        below = [path for path in self.modules if path.startswith(f"{block}.")]
        holding = [path.rpartition(".")[0] for path in below if path.endswith(".experts")]
        whole = [path for path in holding if path != block and not ATTENTION.search(path[len(block) :])]
        if not whole and not spans:
            children = [name for name, _ in self.modules[block].named_children()]
            named = [f"{block}.{name}" for name in children if FEED_FORWARD.search(name) or "moe" in name]
            whole = [path for path in named if next(self.modules[path].parameters(), None) is not None]
        apart = [span for span in spans if not any(span.target.startswith(f"{path}.") for path in whole)]
        return [*(Place(path, path, path, self.width, self.width) for path in whole), *apart]

    def _fused(self, layers: str | list[int] | None) -> Iterator[Fused]:
        for stack, count in self.stacks.items():
            for layer in chosen(layers, count):
                yield from fused_experts(self.modules, f"{stack}.{layer}.", self.width)

    def experts(self) -> list[str]:
        """Paths of the parameters that hold several experts."""
        return [one.path for one in self._fused(None)]

    def _biases(self, point: Point) -> Iterator[Place]:
        blocks = {f"{stack}.{i}." for stack, count in self.stacks.items() for i in chosen(point.layers, count)}
        for path, module in self.modules.items() if self.stacks else ():
            bias = getattr(module, "bias", None) if path in self.every or _is_norm(module) else None
            in_block = any(path.startswith(block) for block in blocks)
            if any(CHOOSER.search(word) for word in path.split(".")):
                continue
            if isinstance(bias, nn.Parameter) and bias.dim() == 1 and (point.layers is None or in_block):
                yield Place(path, path, path, bias.shape[0], bias.shape[0], single=True)

    def _patterned(self, pattern: str, point: Point) -> Iterator[Place]:
        """Linear layers of such a name; where there are none, fused experts."""
        wanted = {one.path for one in self._wanted(point, lambda _: True)}
        named = [path for path in self.every if _fits(path, pattern)]
        for path in named:
            if point.layers is None or path in wanted:
                inputs, outputs = sizes(self.every[path]) or (0, 0)
                yield Place(path, path, path, inputs, outputs, single=True)
        if not named:
            yield from (_of_experts(one) for one in self._fused(point.layers) if _fits(one.path, pattern))

    def _nothing(self, word: str) -> str:
        """What to say where a word or pattern finds no place."""
        leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in self.every))
        words = [w for w in (*SUBLAYERS, *ROLES, *EXPERTS) if self._has(w)]
        name = type(self.model).__name__
        if not self.stacks:
            lists = [path for path, module in self.modules.items() if isinstance(module, nn.ModuleList)]
            return f"{name}: expected blocks (a list of modules with linear layers), found {', '.join(lists) or 'none'}"
        if word == "biases":
            return f"{name}: expected layers with biases, found none; use lora or ia3 on {', '.join(words)}"
        if word in EXPERTS:
            return (
                f"{name}: expected {word} that lie in one parameter, found none; linear layers, those of experts too, "
                "are reached by `linears`"
            )
        hint = "" if word in words else nearest(word.strip("*."), [*leaves, *words])
        return (
            f"{name}: expected a place {word!r}, found none{hint}; there are {', '.join(words) or 'no known places'}, "
            f"and linear layers named {', '.join(leaves[:16])}"
        )

    def _has(self, word: str) -> bool:
        if word in EXPERTS:
            role = word.removeprefix("experts").removeprefix("_")
            return any(not role or one.role == role for one in self._fused(None))
        return next(self._named(word, Point(form="scale", on=[word], insertion="after")), None) is not None


@torch.no_grad()
def call_briefly(model: PreTrainedModel) -> Any:
    """What the model gives for two tokens, as in evaluation; its modules' hooks see it called. A skeleton's too.

    Raises RuntimeError or NotImplementedError where a skeleton cannot be called, such as for experts that are chosen.
    """
    ids, training = torch.zeros(1, 2, dtype=torch.long, device=model.device), model.training
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model.eval()
    try:
        return model(input_ids=ids, **more)
    except RuntimeError:
        if model.device.type != "meta":
            raise
        # ids are looked through for padding, which those of a skeleton cannot be
        table: Any = model.get_input_embeddings()
        return model(inputs_embeds=table(ids), **more)
    finally:
        model.train(training)


def width_of(model: PreTrainedModel) -> int:
    """Channels of what the blocks pass on."""
    named = getattr(model.config.get_text_config(), "hidden_size", None)
    table: Any = model.get_input_embeddings()
    return int(named or table.weight.shape[-1])


def _single(linear: Linear) -> Place:
    return Place(linear.path, linear.path, linear.path, linear.inputs, linear.outputs, single=True)


def _of_experts(one: Fused) -> Place:
    return Place(
        one.path, one.module, one.module, *one.sizes(), parameter=one.parameter, experts=one.count,
        turned=bool(one.turned),
    )  # fmt: skip


def _fits(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _multiplies(module: nn.Module) -> bool:
    """Whether it is a linear layer that gives W x + b and nothing else: not a router, not one of several in a row."""
    size = sizes(module)
    usual = size is None or not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward
    if size is None or usual or is_packed(module):
        return size is not None
    weight: Any = module.weight
    with torch.no_grad():
        try:
            given: Any = type(module).forward(module, weight.new_zeros(2, size[0]))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
    return isinstance(given, torch.Tensor) and tuple(given.shape) == (2, size[1])


def _is_norm(module: nn.Module) -> bool:
    """Whether it multiplies channels and adds to them."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer of any make; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None
