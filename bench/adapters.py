"""Adapters beside peft: training, its memory, decoding, many adapters in one batch, saving and loading.

    sh bench/venv_trl.sh
    OMP_NUM_THREADS=4 python bench/adapters.py            # all of it
    OMP_NUM_THREADS=4 python bench/adapters.py --only rows

Both sides have LoRA of one rank on the same layers of the same weights. Whole trainings (`loops`) are processes of
their own: graft's loop with its log and states, transformers' Trainer and TRL's SFTTrainer with peft, the latter
without the gradient checkpointing that it has by default and the others have not; nothing is told where they do not
train as many weights of one type from the same loss of the same rows. A `step` is forward, backward and AdamW on the
adapter alone. graft's takes products as its loop does, and once more all from MKL, as peft does, which tells what the
choice of the library is worth. peft stands in the test extras: all but TRL run in this environment.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import _training_peer as peers
from _side_by_side import report_times
from _trainings import compare, ours
from graft import models
from graft.adapters import adapters_of, adopt, fold
from graft.products import quick_layers
from graft.tune import lora, parallel_adapter

PACKAGES = ["graft", "peft", "torch", "transformers"]
RANK, ROWS, LINEARS = peers.RANK, 8, peers.LINEARS
HERE = Path(__file__).resolve().parent
PEER = HERE / ".venv-trl" / "bin" / "python"
STEPS, BATCH = 8, 8


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


def stepping(model: Any, inside: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
    """A training step of 8 × 256 tokens, inside what a training is."""
    ids = torch.randint(5, 3900, (ROWS, 256), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model.train()

    def step() -> None:
        with inside():
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


@contextmanager
def without_onednn() -> Iterator[None]:
    """Inside, products of float32 are all MKL's."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def decoding(model: Any, rows: int = 1, tokens: int = 48) -> Callable[[], Any]:
    """Greedy decoding with a cache."""
    ids = torch.randint(5, 3900, (rows, 32), generator=torch.Generator().manual_seed(2))
    model.eval()
    return lambda: model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)


def loops(_: Any, repeats: int) -> None:
    """Whole trainings of LoRA: tokens a second, CPU time, and the peak memory of the process."""
    peer, size = str(HERE / "_training_peer.py"), [str(STEPS), str(BATCH)]
    commands = {
        "graft": [sys.executable, str(HERE / "adapters.py"), "--ours"],
        "peft + transformers.Trainer": [sys.executable, peer, "lora-trainer", *size],
        "peft + trl.SFTTrainer, activations kept": [str(PEER), peer, "lora-sft", *size],
    }
    parameters = sum(p.numel() for p in peers.wider().parameters()) / 1e6
    compare(f"training LoRA of a Llama of {parameters:.1f}M, {BATCH} × 512 tokens", commands, repeats, PACKAGES)


def step(model: Any, repeats: int) -> None:
    """A step of each."""
    steps = {
        "graft, LoRA": stepping(with_lora(model), quick_layers),
        "peft, LoRA": stepping(with_peft(model), nullcontext),
        "graft, LoRA, products by MKL": stepping(with_lora(model), without_onednn),
        "graft, parallel adapter": stepping(with_parallel(model), quick_layers),
    }
    report_times("a training step of LoRA, 8 × 256 tokens", steps, repeats, PACKAGES)


def experts(_: Any, repeats: int) -> None:
    """A step with LoRA on experts that are fused in one parameter, by two ways that models have to compute them."""
    places = [f"experts.{name}" for name in ("gate_up_proj", "down_proj")]
    for how in ("grouped_mm", "eager"):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=4000, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=2,
        )  # fmt: skip
        mine = MixtralForCausalLM(config)
        mine.set_experts_implementation(how)
        theirs = copy.deepcopy(mine)
        adopt(mine, lora.points(lora.Settings(rank=RANK, alpha=2 * RANK, on=["experts"])))
        wished = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=places)
        peft.get_peft_model(theirs, wished)
        steps = {"graft": stepping(mine, quick_layers), "peft": stepping(theirs, nullcontext)}
        what = f"a training step of LoRA on 2 × 16 fused experts, {how}, 8 × 256 tokens"
        report_times(what, steps, repeats, PACKAGES)


def folded(model: Any) -> Any:
    """A copy with graft's LoRA folded in."""
    return fold(with_lora(model))


def decode(model: Any, repeats: int) -> None:
    """Decoding with adapters that are not folded, and with folded ones, beside the model alone."""
    alone = decoding(model)
    apart = {
        "graft, LoRA": decoding(with_lora(model)),
        "peft, LoRA": decoding(with_peft(model)),
        "the model alone": alone,
    }
    report_times("48 tokens decoded, LoRA not folded", apart, repeats, PACKAGES)
    inside = {"graft, LoRA folded": decoding(folded(model)), "the model alone": alone}
    report_times("48 tokens decoded, LoRA folded", inside, repeats, PACKAGES)


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

    works = {"each row its own": together, "switching": in_turn}
    report_times("8 adapters over one base, 48 tokens each", works, repeats, PACKAGES)


def disk(model: Any, repeats: int) -> None:
    """Writing an adapter, and loading the base with it beside loading the base alone."""
    place = Path(tempfile.mkdtemp())
    model.save_pretrained(place / "base")
    loaded = models.load(place / "base")
    adopt(loaded, lora.points(lora.Settings(rank=RANK)), base=place / "base")
    loaded.save_pretrained(place / "adapter")
    works = {
        "saving": lambda: loaded.save_pretrained(place / "adapter"),
        "loading with the base": lambda: models.load(place / "adapter"),
        "loading the base": lambda: models.load(place / "base"),
    }
    report_times("an adapter on disk", works, repeats, PACKAGES)
    shutil.rmtree(place)


PARTS = {"loops": loops, "step": step, "experts": experts, "decode": decode, "rows": rows, "disk": disk}


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
        net = peers.wider()
        adopt(net, lora.points(lora.Settings(rank=RANK, alpha=2 * RANK)))
        print(json.dumps(ours(net, STEPS, BATCH)))
        return
    model = base(said.width, said.layers)
    for name in said.only or PARTS:
        PARTS[name](model, said.repeats)


if __name__ == "__main__":
    main()
