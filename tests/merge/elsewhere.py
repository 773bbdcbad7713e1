"""An accelerator that every machine has: tensors there are apart from the processor's, and may only be copied across.

`meta` stands for it. Its tensors are wrappers whose values lie in memory that nothing reaches but operations among
them: one that mixes them with tensors of the processor fails, as it does on a GPU.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import graft.merge.engine
from graft.merge.stream import Workers

ACROSS = {"_to_copy", "copy_"}
"""Operations that take tensors of both sides."""
counts = {"there": 0, "back": 0}
"""Elements that were brought there, and back."""


class There(torch.Tensor):
    """A tensor on the accelerator."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Makes what is made on `meta` there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = [one for one in given if isinstance(one, There)]
    name, asked = func.overloadpacket.__name__, kwargs.get("device")
    if far and name not in ACROSS and (near := [one for one in given if not isinstance(one, There) and one.dim()]):
        raise RuntimeError(f"{name}: expected all tensors on one device, found one of {list(near[0].shape)} elsewhere")
    stays = bool(far) if asked is None else torch.device(asked).type == "meta"
    if name in ACROSS and len(given) > 0:
        source = given[-1] if name == "copy_" else given[0]
        target = isinstance(given[0], There) if name == "copy_" else stays
        if isinstance(source, There) != target:
            counts["there" if target else "back"] += source.numel()
    if asked is not None:
        kwargs = kwargs | {"device": "cpu"}
    made = func(*tree_map_only(There, lambda t: t.inner, args), **tree_map_only(There, lambda t: t.inner, kwargs))
    if name == "copy_":
        return args[0]
    known = {id(one.inner): one for one in far}
    return tree_map_only(torch.Tensor, lambda t: known.get(id(t), There(t)), made) if stays else made


def enter():
    """This thread's operations go through `Elsewhere` from now on."""
    Elsewhere().__enter__()


class Apart(Workers):
    """Works on the accelerator."""

    def __init__(self, threads=None, device="meta"):
        super().__init__(threads, "meta")
        self._pool = ThreadPoolExecutor(self.threads, initializer=enter)


def known_to_the_engine(monkeypatch):
    """Threads of the engine itself know the accelerator as well."""
    monkeypatch.setattr(graft.merge.engine, "ThreadPoolExecutor", partial(ThreadPoolExecutor, initializer=enter))
    counts.update(there=0, back=0)
