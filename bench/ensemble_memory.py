"""Memory of an ensemble of adapters on one base, beside the base alone and an ensemble of as many models of their own.

Each is loaded from its folder by a process of its own, scores a text of 512 tokens and writes 16. Bytes of weights are
those of the different storages of all parameters; resident memory is what the process has more than before loading.

OMP_NUM_THREADS=4 python bench/ensemble_memory.py [--members 4] [--rank 16]
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from _side_by_side import json_of, machine, versions
from ensemble_scoring import prepared
from graft.adapters import adopt
from graft.adapters.folder import save
from graft.ensemble.model import EnsembleForCausalLM
from graft.tune import lora


def base(folder: Path) -> None:
    """A random Llama of about 88M parameters, with a tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape))
    model.save_pretrained(folder)
    prepared(1)[1].save_pretrained(folder)


def adapter(room: Path, number: int, rank: int) -> None:
    """A LoRA on the base that does something, in a folder, and the model that it makes of the base in another."""
    model = graft.load(room / "base")
    stack = adopt(model, lora.points(lora.Settings(rank=rank)), "own", base=room / "base")
    torch.manual_seed(number)
    with torch.no_grad():
        for weight in stack.sites["own"].parameters():
            weight.normal_(std=0.01)
    save(model, room / f"adapter{number}")
    prepared(1)[1].save_pretrained(room / f"adapter{number}")
    graft.adapt(room / f"whole{number}", adapters=[str(room / f"adapter{number}")], fold=True)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def one(folder: Path) -> dict[str, int]:
    """What loading a folder and using the model takes."""
    before = resident()
    model = graft.load(folder)
    ids = torch.randint(3, 8192, (1, 512))
    with torch.inference_mode():
        model(input_ids=ids)
        model.generate(ids[:, :64], max_new_tokens=16, eos_token_id=None, do_sample=False)
    storages = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in model.parameters()}
    members = len(model.members) if isinstance(model, EnsembleForCausalLM) else 1
    return {"weights": sum(storages.values()), "resident": resident() - before, "members": members}


def main() -> None:
    """A process for each, then the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--members", type=int, default=4)
    words.add_argument("--rank", type=int, default=16)
    words.add_argument("--one", type=Path, help="one folder, for the script itself")
    asked = words.parse_args()
    if asked.one:
        print(json.dumps(one(asked.one)))
        return
    with tempfile.TemporaryDirectory() as place:
        room, numbers = Path(place), range(asked.members)
        base(room / "base")
        for number in numbers:
            adapter(room, number, asked.rank)
        for kind in ("adapter", "whole"):
            graft.ensemble(room / f"{kind}s", members=[str(room / f"{kind}{number}") for number in numbers])
        named = {
            "the base alone": room / "base",
            f"ensemble of {asked.members} adapters (LoRA of rank {asked.rank}) on it": room / "adapters",
            f"ensemble of {asked.members} models of their own": room / "wholes",
        }
        print("| model | weights, MB | of the base | resident, MB |\n|---|---|---|---|")
        alone = None
        for name, folder in named.items():
            found = json_of([sys.executable, __file__, "--one", folder])
            alone = alone or found["weights"]
            sizes = f"{found['weights'] / 1e6:,.1f} | {found['weights'] / alone:.2f} | {found['resident'] / 1e6:,.0f}"
            print(f"| {name} | {sizes} |", flush=True)
    print(f"\n{machine()}. {versions(['graft', 'torch', 'transformers'])}; {datetime.date.today().isoformat()}.")


if __name__ == "__main__":
    main()
