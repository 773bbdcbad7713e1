"""Merging tensors that a test has made, through the engine's own streaming, without models around them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import graft.merge
from graft.checkpoint import TensorReader, TensorWriter
from graft.merge.engine import stream
from graft.merge.journal import Journal
from graft.merge.preflight import Layout
from graft.merge.stream import Workers


class Far(Workers):
    """Treats the processor as an accelerator: what is read is brought there, combined there and brought back."""

    near = False


def streamed(settings, parents, root: Path, seed=0, threads=2, dtype="F32", pool=Workers, device="cpu"):
    """`parents`: model → {name: tensor}. Returns the merged tensors by name."""
    parsed = graft.merge.VERB.parse(settings)
    readers = {}
    for model in parsed.parents:
        folder = root / "in" / model
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in parents[model].items()}, folder / "model.safetensors")
        readers[model] = TensorReader(folder)
    names = {name: tuple(t.shape) for name, t in parents[parsed.parents[0]].items()}
    plan = Layout(
        {name: (dtype, shape) for name, shape in names.items()},
        {name: dict.fromkeys(parsed.parents, name) for name in names},
        {},
    )
    out = root / "out"
    out.mkdir(exist_ok=True)
    (root / "journal").unlink(missing_ok=True)
    writer = TensorWriter(out, plan.tensors)
    with pool(threads, device) as workers:
        stream(parsed, seed, plan, readers, writer, Journal(root / "journal", {}, out), workers)
    writer.close()
    for reader in readers.values():
        reader.close()
    # copies: the next merge writes into the same file
    return {name: t.clone() for name, t in load_file(out / "model.safetensors").items()}


def relatives(count=3, shape=(7, 12), seed=0, step=0.1):
    """A base and models near it: model → {"w": matrix, "v": vector}, float32."""
    draw = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(shape, generator=draw), "v": torch.randn(9, generator=draw)}
    made = {"base": base}
    for name in "abcdefgh"[:count]:
        made[name] = {k: t + step * torch.randn(t.shape, generator=draw) for k, t in base.items()}
    return made
