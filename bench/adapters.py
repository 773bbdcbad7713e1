"""Adapters beside peft: training, its memory, decoding, many adapters in one batch, saving and loading.

    sh bench/venv_trl.sh
    OMP_NUM_THREADS=4 python bench/adapters.py            # all of it
    OMP_NUM_THREADS=4 python bench/adapters.py --only rows

Both sides have LoRA of one rank on the same layers of the same weights. Whole trainings (`loops`) are processes of
their own: graft's loop with its log and states, transformers' Trainer and TRL's SFTTrainer with peft, the latter
without the gradient checkpointing that it has by default and the others have not. A `step` is forward, backward and
AdamW on the adapter alone. peft stands in the test extras: all but TRL run in this environment.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import _training_peer as peers
from _side_by_side import Side, json_of, measure, report, timed
from graft import models
from graft.adapters import adapters_of, adopt, fold
from graft.tune import lora, parallel_adapter

PACKAGES = ["graft", "peft", "torch", "transformers"]
RANK, ROWS, LINEARS = peers.RANK, 8, peers.LINEARS
HERE = Path(__file__).resolve().parent
PEER = HERE / ".venv-trl" / "bin" / "python"
STEPS, BATCH = 12, 8


def base(width: int, layers: int) -> LlamaForCausalLM:
    """A fresh model of about 12 · layers · width² parameters and 4,000 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_lora(model: Any) -> Any:
    """A copy with graft's LoRA."""
    mine = copy.deepcopy(model)
    adopt(mine, lora.points(lora.Settings(rank=RANK, alpha=2 * RANK)))
    return mine


def with_peft(model: Any) -> Any:
    """A copy with peft's, wrapped in place."""
    theirs = copy.deepcopy(model)
    peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS))
    return theirs


def with_parallel(model: Any) -> Any:
    """A copy with a parallel adapter of as many parameters as the LoRA."""
    mine, wanted = copy.deepcopy(model), adapters_of(with_lora(model)).count("adapter")  # type: ignore[union-attr]
    width = round(wanted / model.config.num_hidden_layers / (2 * model.config.hidden_size))
    adopt(mine, parallel_adapter.points(parallel_adapter.Settings(width=width)))
    return mine


def stepping(model: Any) -> Callable[[], None]:
    """A training step of 8 × 256 tokens."""
    ids = torch.randint(5, 3900, (ROWS, 256), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoding(model: Any, rows: int = 1, tokens: int = 48) -> Callable[[], Any]:
    """Greedy decoding with a cache."""
    ids = torch.randint(5, 3900, (rows, 32), generator=torch.Generator().manual_seed(2))
    model.eval()
    return lambda: model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)


def ours() -> dict[str, float]:
    """Tokens a second of LoRA in graft's loop, with its log and its states, and the peak memory of the process."""
    from graft.data.rows import ListRows
    from graft.settings import parse
    from graft.train.loop import train as loop
    from graft.train.losses import TokenLoss
    from graft.train.settings import TrainSettings

    clock = peers.Clock()

    class Ticking(TokenLoss):
        """The start of a step's forward pass is a tick."""

        def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            clock.tick()
            return super().__call__(model, batch)

    net = peers.wider()
    adopt(net, lora.points(lora.Settings(rank=RANK, alpha=2 * RANK)))
    rows = ListRows([{"input_ids": row, "labels": row} for row in peers.tokens(STEPS * BATCH)], shuffle=False)
    given = {"budget": f"{STEPS} steps", "batch_size": BATCH, "learning_rate": peers.LEARNING_RATE, "warmup": 0}
    with tempfile.TemporaryDirectory() as folder:
        out, scratch = Path(folder) / "out", Path(folder) / "scratch"
        loop(net, rows, Ticking(), parse(TrainSettings, given), out, scratch=scratch, seed=0)
    clock.stamps.pop(0)  # the first step warms up
    return {"tokens_per_s": clock.rate(BATCH), "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def loops(_: Any, repeats: int) -> None:
    """Whole trainings of LoRA: tokens a second, and the peak memory of the process."""
    peer, size = str(HERE / "_training_peer.py"), [str(STEPS), str(BATCH)]
    commands = {
        "graft": [sys.executable, str(HERE / "adapters.py"), "--ours"],
        "peft + transformers.Trainer": [sys.executable, peer, "lora-trainer", *size],
        "peft + trl.SFTTrainer, activations kept": [str(PEER), peer, "lora-sft", *size],
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}

    def side(name: str) -> Side:
        def run() -> float:
            found[name].append(json_of(commands[name]))
            return float(found[name][-1]["tokens_per_s"])

        return Side(name, run)

    what = f"LoRA on a Llama of {sum(p.numel() for p in peers.wider().parameters()) / 1e6:.1f}M, {BATCH} × 512 tokens"
    measured = measure([side(name) for name in commands], repeats)
    report(f"training of {what}", measured, "tokens/s", PACKAGES)
    peaks = {name: iter([one["peak_bytes"] / 2**30 for one in all_[-repeats:]]) for name, all_ in found.items()}
    sides = [Side(name, lambda name=name: next(peaks[name])) for name in commands]  # type: ignore[misc]
    report(f"peak memory, {what}", measure(sides, repeats, warmup=0), "GiB", PACKAGES)


def step(model: Any, repeats: int) -> None:
    """A step of each."""
    sides = [("graft, LoRA", with_lora), ("peft, LoRA", with_peft), ("graft, parallel adapter", with_parallel)]
    measured = measure([Side(name, timed(stepping(make(model)))) for name, make in sides], repeats)
    report("a training step of LoRA, 8 × 256 tokens", measured, unit="s", packages=PACKAGES)


def folded(model: Any) -> Any:
    """A copy with graft's LoRA folded in."""
    return fold(with_lora(model))


def decode(model: Any, repeats: int) -> None:
    """Decoding with adapters that are not folded, and with folded ones, beside the model alone."""
    sides = [("graft, LoRA", with_lora), ("peft, LoRA", with_peft), ("the model alone", lambda one: one)]
    measured = measure([Side(name, timed(decoding(make(model)))) for name, make in sides], repeats)
    report("48 tokens decoded, LoRA not folded", measured, unit="s", packages=PACKAGES)
    sides = [("graft, LoRA folded", folded), ("the model alone", lambda one: one)]
    measured = measure([Side(name, timed(decoding(make(model)))) for name, make in sides], repeats)
    report("48 tokens decoded, LoRA folded", measured, unit="s", packages=PACKAGES)


def rows(model: Any, repeats: int) -> None:
    """Eight adapters over one base: a batch in which each row has its own, beside switching from row to row."""
    model = copy.deepcopy(model)
    for number in range(ROWS):
        adopt(model, lora.points(lora.Settings(rank=RANK)), f"adapter{number}")
    stack = adapters_of(model)
    assert stack is not None
    names = list(stack.points)
    whole, one = decoding(model, ROWS), decoding(model)

    def together() -> None:
        with stack.each_row(names):
            whole()

    def in_turn() -> None:
        for name in names:
            with stack.using(name):
                one()

    sides = [Side("each row its own", timed(together)), Side("switching", timed(in_turn))]
    report("8 adapters over one base, 48 tokens each", measure(sides, repeats), unit="s", packages=PACKAGES)


def disk(model: Any, repeats: int) -> None:
    """Writing an adapter, and loading the base with it beside loading the base alone."""
    place = Path(tempfile.mkdtemp())
    model.save_pretrained(place / "base")
    loaded = models.load(place / "base")
    adopt(loaded, lora.points(lora.Settings(rank=RANK)), base=place / "base")
    loaded.save_pretrained(place / "adapter")
    sides = [
        Side("saving", timed(lambda: loaded.save_pretrained(place / "adapter"))),
        Side("loading with the base", timed(lambda: models.load(place / "adapter"))),
        Side("loading the base", timed(lambda: models.load(place / "base"))),
    ]
    report("an adapter on disk", measure(sides, repeats), unit="s", packages=PACKAGES)
    shutil.rmtree(place)


PARTS = {"loops": loops, "step": step, "decode": decode, "rows": rows, "disk": disk}


def main() -> None:
    """Measure what is asked for."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", choices=PARTS, action="append")
    words.add_argument("--repeats", type=int, default=5)
    words.add_argument("--width", type=int, default=512)
    words.add_argument("--layers", type=int, default=8)
    words.add_argument("--ours", action="store_true", help="one training of ours, for the script itself")
    said = words.parse_args()
    if said.ours:
        print(json.dumps(ours()))
        return
    model = base(said.width, said.layers)
    for name in said.only or PARTS:
        PARTS[name](model, said.repeats)


if __name__ == "__main__":
    main()
