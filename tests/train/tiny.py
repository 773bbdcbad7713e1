"""A tiny Llama, the bytes of this interpreter's library as rows, a loss; and, run as a script, one training.

python tiny.py FOLDER SETTINGS_JSON     trains into FOLDER/out with FOLDER/scratch, writes FOLDER/weights
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from graft.data.rows import ListRows
from graft.settings import parse
from graft.train.cross_entropy import summed_cross_entropy
from graft.train.deferred import Deferred, loss_of_logits
from graft.train.loop import train
from graft.train.settings import TrainSettings

LENGTH = 24


class ByteLoss:
    """Next byte, summed; -100 is masked. Logits are `whole` where they must be, and nowhere else."""

    whole = False

    def weight(self, batch):
        return int((batch["labels"] != -100).sum())

    def __call__(self, model, batch):
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        return loss_of_logits(model, inputs, lambda logits: self.summed(logits, batch["labels"]))

    def summed(self, logits, labels):
        assert isinstance(logits, Deferred) != self.whole
        return summed_cross_entropy(logits, labels)


class Scored(ByteLoss):
    """On dev rows the given losses, one a measurement (a batch holds all the rows); raises in step `stop` of a run."""

    def __init__(self, scores, stop=0):
        self.scores, self.left = iter(scores), stop

    def __call__(self, model, batch):
        if not model.training:
            return torch.tensor(float(next(self.scores) * self.weight(batch)))
        self.left -= 1
        if self.left == 0:
            raise Stops
        return super().__call__(model, batch)


class Stops(Exception):
    """As a kill would."""


def tiny_model(dropout=0.0, width=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


def byte_rows(count=64, skip=0, ragged=True):
    """Rows of real bytes; when ragged, row i has its first (5 i) % 17 labels masked, so that weights differ."""
    text = np.frombuffer(Path(shutil.__file__).read_bytes(), np.uint8).astype(np.int64)
    rows = []
    for number in range(count):
        start = (skip + number) * LENGTH
        labels = text[start + 1 : start + LENGTH + 1].copy()
        labels[: (5 * number) % 17 if ragged else 0] = -100
        rows.append({"input_ids": text[start : start + LENGTH], "labels": labels})
    return ListRows(rows, seed=3)


def settings(**given):
    return parse(TrainSettings, {"budget": "6 steps", "batch_size": 8, "learning_rate": 0.01, **given})


def run(folder, given=None, *, model=None, rows=None, **more):
    """One training on the CPU in `folder`; (result, model)."""
    model = model or tiny_model()
    result = train(
        model,
        rows or byte_rows(),
        more.pop("objective", ByteLoss()),
        settings(**(given or {})),
        Path(folder) / "out",
        scratch=Path(folder) / "scratch",
        seed=7,
        device="cpu",
        save=lambda model, target: model.save_pretrained(target),
        **more,
    )
    return result, model


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "out" / "log.jsonl").read_text().splitlines()]


def train_into(folder, given, dropout=0.0):
    """What a verb does: train (going on where a killed run stood), then write FOLDER/weights in one go."""
    from accelerate import PartialState

    torch.set_num_threads(1)
    folder = Path(folder)
    _, trained = run(folder, given, model=tiny_model(dropout), dev=byte_rows(20, skip=100))
    if PartialState().is_main_process:
        save_file({name: p.detach() for name, p in trained.named_parameters()}, folder / "weights.partial")
        (folder / "weights.partial").rename(folder / "weights")


if __name__ == "__main__":
    train_into(sys.argv[1], json.loads(sys.argv[2]))
