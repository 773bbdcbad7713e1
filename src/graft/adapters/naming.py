"""What the linear layers of a block are, from the names and types of the modules around them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
CROSS = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.IGNORECASE)
FEED_FORWARD = re.compile(
    r"mlp|ffn|feed_?forward|dense|intermediate|^output$|^ff|^fc\d?$|c_fc|^lin\d$|^w[io](_\d)?$|^w[123]$|up_proj|down_proj",
    re.IGNORECASE,
)
WHOLE = re.compile(r"mlp|ffn|feed_?forward|moe|experts?$", re.IGNORECASE)
"""Modules that are a feed-forward, or part of one, and of nothing else."""
WHOLE_TYPE = re.compile(r"(mlp|ffn|feed_?forward|moe|moe_?block|experts?)$", re.IGNORECASE)
"""Types of such: the name of a family may have `Moe` in it."""
CHOOSER = re.compile(r"router$|^indexer$", re.IGNORECASE)
"""Modules that choose experts or tokens."""
CHOOSING = "choosing"
"""The part of what chooses."""

MARKS = {"query": {"q", "query", "wq"}, "key": {"k", "key", "wk"}, "value": {"v", "value", "wv"}}
"""Parts of a linear layer's name, between underscores, that say what it makes in attention."""
LAST = {"o", "out", "output", "wo", "down", "dense", "fc2", "w2", "lin2"}
"""Parts of the name of the layer that gives what attention or feed-forward give, if it is no `gate`."""
NAMELESS = {"linear", "proj", "layer"}
"""Names that leave it to the module around the layer to say what it is."""


@dataclass(frozen=True)
class Linear:
    """A linear layer in a block: its path, the block it stands in, part (`attention`, …) and role (`query`, …).

    `group` names the attention or feed-forward it is of, where a block has several.
    """

    path: str
    stack: str
    layer: int
    part: str
    group: str
    role: str
    inputs: int
    outputs: int


def block_linears(
    stack: str, layer: int, modules: Mapping[str, nn.Module], sizes: Mapping[str, tuple[int, int]], width: int
) -> Iterator[Linear]:
    """The linear layers of the block `stack.layer`, whose inputs and outputs are `sizes`, by path.

    `modules` are all of the model by path; `width` is the number of channels that blocks pass on.
    """
    block = f"{stack}.{layer}"
    where = {path: _belongs(block, path, modules) for path in sizes}
    for path, (inputs, outputs) in sizes.items():
        part, group = where[path]
        mates = [other for other in sizes if where[other][0] == part]
        near = [mate for mate in mates if where[mate][1] == group]
        role = _role(path, part, mates, near, [mate for mate in near if sizes[mate][1] == width])
        yield Linear(path, stack, layer, part, group, role, inputs, outputs)


def _belongs(block: str, path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """(part, group) of the linear layer at `path`."""
    words = path[len(block) + 1 :].split(".")
    around = [
        (".".join(words[:i]), words[i - 1], modules[f"{block}.{'.'.join(words[:i])}"]) for i in range(1, len(words))
    ]
    if _chooses(block, words, modules):
        return CHOOSING, ""
    types = [type(module).__name__ for _, _, module in around]
    if any(name.endswith("Norm") and not ATTENTION.search(name) for name in types):
        return words[0], ""
    kind = next((kind for _, name, module in reversed(around) if (kind := _kind(name, module))), None)
    if kind is None and any(FEED_FORWARD.search(word) for word in words):
        kind = "feed_forward"
    if kind is None and ATTENTION.search(type(modules[block]).__name__):
        kind = "attention"
    if kind is None:
        return words[0], ""
    group = _group(ATTENTION if kind == "attention" else WHOLE, around)
    crossed = kind == "attention" and any(_says(CROSS, name, module) for _, name, module in around)
    return "cross_attention" if crossed else kind, group


def _chooses(block: str, words: Sequence[str], modules: Mapping[str, nn.Module]) -> bool:
    """Whether the layer is, or is in, a router, an indexer, or a gate that stands beside experts."""
    for i, word in enumerate(words):
        here = ".".join([block, *words[:i]])
        beside = f"{here}.experts" in modules and re.search(r"(^|_)gate$", word)
        if beside or CHOOSER.search(word) or CHOOSER.search(type(modules[f"{here}.{word}"]).__name__):
            return True
    return False


def _kind(name: str, module: nn.Module) -> str | None:
    if _says(ATTENTION, name, module) and not WHOLE.search(name):
        return "attention"
    return "feed_forward" if _says(WHOLE, name, module) else None


def _says(words: re.Pattern[str], name: str, module: nn.Module) -> bool:
    types = WHOLE_TYPE if words is WHOLE else words
    return bool(words.search(name) or types.search(type(module).__name__))


def _group(words: re.Pattern[str], around: Sequence[tuple[str, str, nn.Module]]) -> str:
    """The outermost module that `words` tell of, below the innermost element of a list; that element if none is."""
    lists = [i for i, (_, _, module) in enumerate(around) if isinstance(module, nn.ModuleList | nn.ModuleDict)]
    start = lists[-1] + 1 if lists else 0
    below = [path for path, name, module in around[start:] if _says(words, name, module)]
    return next(iter(below), around[start][0] if lists and start < len(around) else "")


def _role(path: str, part: str, mates: Sequence[str], near: Sequence[str], ends: Sequence[str]) -> str:
    """What the layer does.

    `mates` are the layers of its part of the block, `near` those of its group, `ends` those of them that give as many
    channels as the block passes on.
    """
    if part == "feed_forward":
        return "down" if path == _last(ends) else "up"
    if not part.endswith("attention"):
        return "other"
    marks = {mate: _marked(mate) for mate in mates}
    if marks[path] == "kv":  # the last of several gives keys and values
        return "kv" if path == [mate for mate in near if marks[mate] == "kv"][-1] else "other"
    if marks[path] or path == _last([mate for mate in ends if not marks[mate]]):
        return marks[path] or "output"
    return "other" if any(marks.values()) else "qkv"


def _last(ends: Sequence[str]) -> str | None:
    """The layer that gives what all of them give: one that says so, or the last."""
    named = [path for path in ends if _words(path) & LAST and "gate" not in _words(path)]
    return next(reversed(named or ends), None)


def _marked(path: str) -> str:
    """`query`, `key`, `value`, `kv` or `qkv` where the name of a layer says so, else nothing."""
    words = _words(path)
    found = [role for role, marks in MARKS.items() if words & marks]
    if len(found) == 3 or any("qkv" in word for word in words):
        return "qkv"
    if "kv" in words or found == ["key", "value"]:
        return "kv"
    return found[0] if len(found) == 1 else ""


def _words(path: str) -> set[str]:
    """The words of a layer's name."""
    *around, name = path.lower().split(".")
    return set((around[-1] if around and name in NAMELESS else name).split("_"))
