"""Where in a model adapters go: blocks, their attention, feed-forward and linear layers, from types and names.

No architecture is known by name. Blocks are the elements of the outermost module lists that hold linear layers. A
linear layer belongs to attention where a module around it says so in its name or type, to the feed-forward where its
own name or one around it does. Roles follow from names (`q_proj`, `query`, `wq`) and sizes.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.adapters.point import LINEARS, ROLES, SUBLAYERS, Point, beyond, chosen
from graft.errors import RequestError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
CROSS = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.IGNORECASE)
FEED_FORWARD = re.compile(
    r"mlp|ffn|feed_?forward|dense|intermediate|^output$|^ff|^fc\d?$|c_fc|^lin\d$|^w[io](_\d)?$|^w[123]$|up_proj|down_proj",
    re.IGNORECASE,
)
MARKS = {"query": {"q", "query", "wq"}, "key": {"k", "key", "wk"}, "value": {"v", "value", "wv"}}
"""Parts of a linear layer's name, between underscores, that say what it makes in attention."""


@dataclass(frozen=True)
class Linear:
    """A linear layer in a block: its path, the block it stands in, part (`attention`, …) and role (`query`, …)."""

    path: str
    stack: str
    layer: int
    part: str
    role: str
    inputs: int
    outputs: int


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


class Layout:
    """What is where in a model. `stacks`: number of blocks of each stack, by the path of the list."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.modules = dict(model.named_modules())
        self.every = {path: module for path, module in self.modules.items() if sizes(module) is not None}
        self.stacks: dict[str, int] = {}
        self.linears: list[Linear] = []
        self.width = width_of(model)
        for path, module in self.modules.items():
            inside = any(path.startswith(f"{stack}.") for stack in self.stacks)
            if isinstance(module, nn.ModuleList) and not inside and self._are_blocks(path, module):
                self.stacks[path] = len(module)
                for number in range(len(module)):
                    self.linears += self._block(path, number)

    def _are_blocks(self, path: str, module: nn.ModuleList) -> bool:
        below = [name for name in self.every if name.startswith(f"{path}.")]
        return bool(below) and all(any(name.startswith(f"{path}.{i}.") for name in below) for i in range(len(module)))

    def _block(self, stack: str, number: int) -> Iterator[Linear]:
        start = f"{stack}.{number}."
        paths = [path for path in self.every if path.startswith(start)]
        parts = {path: self._part(path, start) for path in paths}
        for path in paths:
            mates = [p for p in paths if parts[p] == parts[path]]
            inputs, outputs = sizes(self.every[path]) or (0, 0)
            yield Linear(path, stack, number, parts[path], self._role(path, parts[path], mates), inputs, outputs)

    def _part(self, path: str, start: str) -> str:
        words = path[len(start) :].split(".")
        around = [self.modules[f"{start}{'.'.join(words[: i + 1])}"] for i in range(len(words) - 1)]
        names = [*words[:-1], *(type(module).__name__ for module in around)]
        if any(ATTENTION.search(name) for name in names):
            return "cross_attention" if any(CROSS.search(name) for name in names) else "attention"
        return "feed_forward" if any(FEED_FORWARD.search(name) for name in words) else words[0]

    def _role(self, path: str, part: str, mates: Sequence[str]) -> str:
        marks = {mate: _marked(mate) for mate in mates}
        if part.endswith("attention"):
            last = next((mate for mate in reversed(mates) if not marks[mate] and self._ends(mate)), None)
            fused = "qkv" if "query" not in marks.values() else "other"
            return marks[path] or ("output" if path == last else fused)
        if part == "feed_forward":
            last = next((mate for mate in reversed(mates) if self._ends(mate)), mates[-1])
            return "down" if path == last else "up"
        return "other"

    def _ends(self, path: str) -> bool:
        """Whether the layer gives what the block passes on."""
        return (sizes(self.every[path]) or (0, 0))[1] == self.width

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
            here = next((some for one in word.split("|") if (some := list(self._named(one, point)))), None)
            if here is None:
                raise RequestError(self._nothing(word.split("|")[0]))
            found.update({place.path: place for place in here})
        return list(found.values())

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
            yield from map(_single, self._wanted(point, lambda one: not part or one.part == part))
        elif word in ROLES:
            found = self._wanted(point, lambda one: one.role == word)
            yield from map(_single, found)
        else:
            yield from self._patterned(word, point)

    def _wanted(self, point: Point, test: Callable[[Linear], bool]) -> list[Linear]:
        blocks = {stack: set(chosen(point.layers, count)) for stack, count in self.stacks.items()}
        return [one for one in self.linears if one.layer in blocks[one.stack] and test(one)]

    def _sublayers(self, part: str, point: Point) -> Iterator[Place]:
        """From what the first linear layer of a block's attention or feed-forward reads to what the last one gives."""
        chosen_ones = self._wanted(point, lambda one: one.part == part)
        for block in dict.fromkeys((one.stack, one.layer) for one in chosen_ones):
            inside = [one for one in chosen_ones if (one.stack, one.layer) == block]
            last = next((one for one in inside if one.role in ("output", "down")), None)
            starts = [one for one in inside if one.inputs == self.width and one is not last]
            # in cross-attention only the query reads what the block does
            first = next((one for one in starts if one.role in ("query", "qkv")), next(iter(starts), None))
            if first is not None and last is not None:
                name = f"{block[0]}.{block[1]}.{part}"
                yield Place(name, first.path, last.path, first.inputs, last.outputs)
        if not chosen_ones and part == "feed_forward":
            yield from self._whole_feed_forwards(point)

    def _whole_feed_forwards(self, point: Point) -> Iterator[Place]:
        """Modules that are a block's feed-forward by name and hold no linear layers (fused experts)."""
        for stack, count in self.stacks.items():
            for layer in chosen(point.layers, count):
                for name, module in self.modules[f"{stack}.{layer}"].named_children():
                    if FEED_FORWARD.search(name) or "moe" in name:
                        path = f"{stack}.{layer}.{name}"
                        if next(module.parameters(), None) is not None:
                            yield Place(path, path, path, self.width, self.width)

    def _biases(self, point: Point) -> Iterator[Place]:
        blocks = {f"{stack}.{i}." for stack, count in self.stacks.items() for i in chosen(point.layers, count)}
        for path, module in self.modules.items():
            bias = getattr(module, "bias", None) if hasattr(module, "weight") else None
            in_block = any(path.startswith(block) for block in blocks)
            if isinstance(bias, nn.Parameter) and bias.dim() == 1 and (point.layers is None or in_block):
                yield Place(path, path, path, bias.shape[0], bias.shape[0], single=True)

    def _patterned(self, pattern: str, point: Point) -> Iterator[Place]:
        wanted = {one.path for one in self._wanted(point, lambda _: True)}
        for path, module in self.every.items():
            fits = fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")
            if fits and (point.layers is None or path in wanted):
                inputs, outputs = sizes(module) or (0, 0)
                yield Place(path, path, path, inputs, outputs, single=True)

    def _nothing(self, word: str) -> str:
        """What to say where a word or pattern finds no place."""
        leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in self.every))
        words = [w for w in (*SUBLAYERS, *ROLES) if self._has(w)]
        name = type(self.model).__name__
        if not self.stacks:
            lists = [path for path, module in self.modules.items() if isinstance(module, nn.ModuleList)]
            return f"{name}: expected blocks (a list of modules with linear layers), found {', '.join(lists) or 'none'}"
        if word == "biases":
            return f"{name}: expected layers with biases, found none; use lora or ia3 on {', '.join(words)}"
        hint = nearest(word.strip("*."), [*leaves, *words])
        return (
            f"{name}: expected a place {word!r}, found none{hint}; there are {', '.join(words) or 'no known places'}, "
            f"and linear layers named {', '.join(leaves[:16])}"
        )

    def _has(self, word: str) -> bool:
        if word in SUBLAYERS:
            return any(one.part == word for one in self.linears)
        return any(one.role == word for one in self.linears)


@torch.no_grad()
def call_briefly(model: PreTrainedModel) -> None:
    """Call the model on two tokens, as in evaluation, for what its modules' hooks are to see; a skeleton too.

    Raises RuntimeError or NotImplementedError where a skeleton cannot be called, such as for experts that are chosen.
    """
    ids, training = torch.zeros(1, 2, dtype=torch.long, device=model.device), model.training
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model.eval()
    try:
        model(input_ids=ids, **more)
    except RuntimeError:
        if model.device.type != "meta":
            raise
        # ids are looked through for padding, which those of a skeleton cannot be
        table: Any = model.get_input_embeddings()
        model(inputs_embeds=table(ids), **more)
    finally:
        model.train(training)


def width_of(model: PreTrainedModel) -> int:
    """Channels of what the blocks pass on."""
    named = getattr(model.config.get_text_config(), "hidden_size", None)
    table: Any = model.get_input_embeddings()
    return int(named or table.weight.shape[-1])


def _single(linear: Linear) -> Place:
    return Place(linear.path, linear.path, linear.path, linear.inputs, linear.outputs, single=True)


def _marked(path: str) -> str:
    """`query`, `key` or `value` where the name of a layer says so, else nothing."""
    words = set(path.rpartition(".")[2].lower().split("_"))
    found = [role for role, marks in MARKS.items() if words & marks]
    return found[0] if len(found) == 1 else ""


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer of any make; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None
