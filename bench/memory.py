"""What memory a training was said to need beside the peak of what torch held, counted at every operation of the loop.

OMP_NUM_THREADS=4 python bench/memory.py [--only "gpt2 25M, LoRA" …]
OMP_NUM_THREADS=1 python bench/memory.py --spread
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _side_by_side import machine, versions

CASES: dict[str, dict[str, Any]] = {
    "llama 25M, fp32": {"width": 512, "layers": 8},
    "llama 25M, bf16": {"width": 512, "layers": 8, "precision": "bf16"},
    "llama 25M, fp32, checkpointing": {"width": 512, "layers": 8, "gradient_checkpointing": True},
    "llama 25M, fp32, accumulate 4": {"width": 512, "layers": 8, "accumulate": 4},
    "llama 25M, fp32, moments of 8 bits": {"width": 512, "layers": 8, "optimizer": "adamw_8bit", "batch_size": 1},
    "llama 25M, LoRA": {"width": 512, "layers": 8, "method": "lora"},
    "llama 25M, parallel adapter": {"width": 512, "layers": 8, "method": "parallel_adapter"},
    "llama 25M, prefix": {"width": 512, "layers": 8, "method": "prefix"},
    "llama 25M, LoRA, checkpointing": {"width": 512, "layers": 8, "method": "lora", "gradient_checkpointing": True},
    "llama 25M in NF4, LoRA": {"width": 512, "layers": 8, "method": "lora", "bits": 4},
    "llama 85M, fp32": {"width": 768, "layers": 12},
    "llama 85M, fp32, accumulate 8": {"width": 768, "layers": 12, "accumulate": 8},
    "gpt2 25M, fp32": {"kind": "gpt2", "width": 512, "layers": 8},
    "gpt2 25M, bf16": {"kind": "gpt2", "width": 512, "layers": 8, "precision": "bf16"},
    "gpt2 25M, LoRA": {"kind": "gpt2", "width": 512, "layers": 8, "method": "lora"},
}
LLAMA = {"width": 512, "layers": 8}
TWO, FOUR = {"method": "fsdp", "devices": 2}, {"method": "fsdp", "devices": 4}
SPREAD: dict[str, dict[str, Any]] = {
    "llama 25M, fp32, 2 processes": {**LLAMA, "parallel": TWO},
    "llama 25M, fp32, 4 processes": {**LLAMA, "parallel": FOUR},
    "llama 85M, fp32, 2 processes": {"width": 768, "layers": 12, "parallel": TWO},
    "llama 85M, fp32, 4 processes": {"width": 768, "layers": 12, "parallel": FOUR},
    "llama 85M, checkpointing, 4 processes": {
        "width": 768, "layers": 12, "gradient_checkpointing": True, "parallel": FOUR,
    },
    "llama 85M, accumulate 2, 2 processes": {"width": 768, "layers": 12, "accumulate": 2, "parallel": TWO},
    "llama 85M, moments of 8 bits, 2 processes": {
        "width": 768, "layers": 12, "optimizer": "adamw_8bit", "parallel": TWO,
    },
    "llama 25M, LoRA, 2 processes": {**LLAMA, "method": "lora", "parallel": TWO},
    "llama 85M, LoRA, checkpointing, 4 processes": {
        "width": 768, "layers": 12, "method": "lora", "gradient_checkpointing": True, "parallel": FOUR,
    },
    "llama 25M in NF4, LoRA, 2 processes": {**LLAMA, "method": "lora", "bits": 4, "parallel": TWO},
    "gpt2 25M, fp32, 4 processes": {"kind": "gpt2", **LLAMA, "parallel": FOUR},
}  # fmt: skip
"""Models spread over processes (gloo, each with one thread): what the one holds that holds most, while it trains."""
ZERO: dict[str, dict[str, Any]] = {
    f"llama 25M, {said}, {processes} processes": {
        **LLAMA, **more, "parallel": {"method": "zero", "stage": stage, "devices": processes},
    }
    for said, more, stage, processes in [
        ("stage 1", {}, 1, 2), ("stage 1", {}, 1, 4), ("stage 2", {}, 2, 2), ("stage 2", {}, 2, 4),
        ("stage 3", {}, 3, 2), ("stage 3", {}, 3, 4), ("stage 3, LoRA", {"method": "lora"}, 3, 2),
        ("stage 2, LoRA", {"method": "lora"}, 2, 2),
    ]
}  # fmt: skip
"""The same by DeepSpeed."""
SETTINGS = ("precision", "gradient_checkpointing", "accumulate", "optimizer", "batch_size", "parallel")
LENGTH, ROWS, VOCABULARY = 512, 8, 8000


def config(case: dict[str, Any]) -> Any:
    """The configuration of a case."""
    from transformers import AutoConfig

    width, layers = case["width"], case["layers"]
    if case.get("kind") == "gpt2":
        return AutoConfig.for_model(
            "gpt2", n_embd=width, n_layer=layers, n_head=8, n_positions=LENGTH, vocab_size=VOCABULARY,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    return AutoConfig.for_model(
        "llama", hidden_size=width, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=int(width * 8 / 3) // 16 * 16, vocab_size=VOCABULARY,
    )  # fmt: skip


def made(case: dict[str, Any], room: Path) -> tuple[Any, dict[str, Any]]:
    """The model of a case, and what an estimate is told of an adapter on it and of its frozen weights."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from graft import models
    from graft.adapters import adopt
    from graft.methods import method
    from graft.quantize.work import weight_bytes
    from graft.train.memory import Dimensions
    from graft.tune import kept_by

    model = AutoModelForCausalLM.from_config(config(case))
    parameters, frozen = model.num_parameters(), 4.0
    if "bits" in case:
        model.save_pretrained(room / "plain")
        packing = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="float32",
        )
        model = models.load(room / "plain", dtype="float32", quantization=packing)
        frozen = weight_bytes(model) / parameters
    if "method" not in case:
        return model, {}
    chosen = method("graft.tune", case["method"])
    points, known = chosen.points(chosen.Settings()), Dimensions.of(model.config.to_dict())
    assert known is not None
    trained = adopt(model, points).count("adapter")
    return model, {"trained": trained, "frozen_bytes": frozen, "reads": kept_by(points, known)}


class Held:
    """Bytes of all storages that are there, and the most there were: looked at behind every operation."""

    def __init__(self) -> None:
        from torch.utils.weak import WeakIdKeyDictionary

        self.known, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def add(self, tensor: Any) -> None:
        """A tensor that may be new; its storage counts until it goes. Of one in parts, the part that is here."""
        if tensor.is_meta:
            return
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        if storage not in self.known:
            size = [storage.nbytes()]
            self.known[storage] = size
            self.now += size[0]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, size)

    def free(self, size: list[int]) -> None:
        """A storage is gone."""
        self.now -= size[0]

    def look(self) -> None:
        """Storages may have grown or shrunk in their place, as those of weights in parts do."""
        for storage, size in list(self.known.items()):
            self.now += storage.nbytes() - size[0]
            size[0] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def anew(self) -> None:
        """What there was before does not count."""
        gc.collect()
        self.look()
        self.peak = self.now

    def watching(self, resized: bool = False) -> Any:
        """Inside, every operation is looked at, those of backward and of the optimizer too.

        `resized`: at each of them all storages are, which may have another size than before.
        """
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_map_only

        held = self

        class Watch(TorchDispatchMode):
            """Adds what operations give."""

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                found = func(*args, **(kwargs or {}))
                tree_map_only(torch.Tensor, held.add, found)
                if resized:
                    held.look()
                return found

        return Watch()


def weights_in(model: Any) -> Iterator[Any]:
    """All tensors of a model, the constants of packed weights included."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter.data
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, *((state.state2.absmax, state.state2.code) if state.nested else ()))


def one(case: dict[str, Any], room: Path) -> dict[str, float]:
    """Train two steps; bytes said and bytes taken. Of several processes those of the one that takes most."""
    import numpy as np

    from graft.data.rows import ListRows
    from graft.settings import parse
    from graft.train.estimate import training_estimate
    from graft.train.loop import train
    from graft.train.losses import TokenLoss
    from graft.train.memory import PROCESS, Dimensions
    from graft.train.settings import TrainSettings

    options = {k: v for k, v in case.items() if k in SETTINGS}
    spread = "parallel" in case
    given = {"budget": f"{2 + spread} steps", "batch_size": ROWS, "checkpoint_every": "100 steps", **options}
    settings = parse(TrainSettings, given)
    model, more = made(case, room)
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(ROWS * (2 + spread)):
        ids = draw.integers(3, VOCABULARY, LENGTH)
        places = {"segments": np.zeros(LENGTH, np.int64), "positions": np.arange(LENGTH)}
        rows.append({"input_ids": ids, "labels": ids, **places})
    known, parameters = Dimensions.of(model.config.to_dict()), config_parameters(case)
    said = training_estimate(parameters, settings, LENGTH, known, **more).memory_bytes - PROCESS
    held, peaks = Held(), list[int]()
    for tensor in weights_in(model):
        held.add(tensor)

    def before(step: int) -> None:
        """Of a model in parts, count what two steps take: not its loading and its putting together again."""
        if step == 0:
            held.anew()
        peaks.append(held.peak)

    with held.watching(resized=spread):
        train(
            model, ListRows(rows), TokenLoss(), settings, room / "out", scratch=room / "scratch", seed=0,
            before_step=before if spread else None,
        )  # fmt: skip
    return {"said": said, "took": most_of_all(peaks[-1]) if spread else held.peak, "parameters": parameters}


def most_of_all(mine: int) -> int:
    """The largest of what the processes have."""
    import torch

    found = torch.tensor(mine)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def config_parameters(case: dict[str, Any]) -> int:
    """Parameters of the plain model."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config(case)).num_parameters())


def measured(name: str) -> dict[str, float]:
    """A case in a process of its own, or in several."""
    processes = {**CASES, **SPREAD, **ZERO}[name].get("parallel", {}).get("devices")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *launcher, __file__, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """A process a case, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="one case, for the script itself")
    every = {**CASES, **SPREAD, **ZERO}
    parser.add_argument("--only", nargs="+", choices=every, metavar="CASE", help="these cases")
    parser.add_argument("--spread", action="store_true", help="the cases of several processes")
    parser.add_argument("--zero", action="store_true", help="the cases of several processes under DeepSpeed")
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as room:
            found = one(every[given.one], Path(room))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    print("### memory of training, said and taken\n")
    print("| case | parameters | said, MB | taken, MB | error |\n|---|---|---|---|---|")
    for name in given.only or (ZERO if given.zero else SPREAD if given.spread else CASES):
        found = measured(name)
        error = found["said"] / found["took"] - 1
        sizes = f"{found['said'] / 1e6:,.0f} | {found['took'] / 1e6:,.0f}"
        print(f"| {name} | {found['parameters'] / 1e6:.1f}M | {sizes} | {error:+.0%} |", flush=True)
    print(f"\n{machine()}. {versions(['graft', 'torch', 'transformers'])}; {datetime.date.today().isoformat()}.")


if __name__ == "__main__":
    main()
