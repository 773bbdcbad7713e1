"""One training of a Llama of about 10M parameters by a peer; prints its figures as JSON. Also holds model and data.

python _training_peer.py bare|trainer|sft|lora-bare|lora-trainer|lora-sft STEPS BATCH

`lora-…` train peft's LoRA of rank 8 on all linear layers of a frozen Llama of about 25M parameters.
"""

import json
import resource
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

LENGTH, VOCABULARY, LEARNING_RATE = 512, 4096, 3e-4


def model():
    """A decoder of about 10M parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6, "num_attention_heads": 5}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape))


RANK = 8
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def wider():
    """A decoder of about 25M parameters, which adapters are put on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1365, "num_hidden_layers": 8, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape))


def with_lora():
    """The wider model with peft's LoRA."""
    import peft

    return peft.get_peft_model(wider(), peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS))


def tokens(rows):
    """`rows` rows of this interpreter's library, pairs of bytes as ids below the vocabulary: [rows, 512] int64."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8).astype(np.int64)
    ids = (text[:-1:2] * 31 + text[1::2]) % VOCABULARY
    return np.resize(ids, (rows, LENGTH))


class Clock:
    """Times the steps behind the first, which warms up; notes the loss of the first, which all have alike."""

    def __init__(self):
        self.stamps, self.first_loss = [], None

    def tick(self):
        self.stamps.append((time.perf_counter(), time.process_time()))

    def figures(self, batch, net):
        """What this process took, and what it worked at: a comparison holds for equal work alone."""
        steps = len(self.stamps) - 1
        if steps < 1:
            raise SystemExit("expected a step behind those that are not counted, found none: train for more steps")
        wall, cpu = (last - first for first, last in zip(self.stamps[0], self.stamps[-1], strict=True))
        return {
            "tokens_per_s": steps * batch * LENGTH / wall,
            "cpu_s_per_1000_tokens": 1000 * cpu / (steps * batch * LENGTH),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "work": {
                "trained": sum(p.numel() for p in net.parameters() if p.requires_grad),
                "type": str({p.dtype for p in net.parameters()}),
                "first_loss": self.first_loss and round(self.first_loss, 6),
                "threads": torch.get_num_threads(),
            },
        }


def bare(steps, batch, make=model):
    """What a person writes by hand: AdamW, clipping, a schedule, no more."""
    net, ids = make().train(), torch.from_numpy(tokens(steps * batch))
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    clock = Clock()
    for step in range(steps):
        rows = ids[step * batch : (step + 1) * batch]
        logits = net(input_ids=rows, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick()
        clock.first_loss = clock.first_loss or loss.item()
    return clock.figures(batch, net)


def ticking(clock):
    """A callback of transformers that ticks behind each step."""
    from transformers import TrainerCallback

    class Ticking(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.tick()

        def on_log(self, *_, logs, **__):
            clock.first_loss = clock.first_loss or float(logs["loss"])

    return Ticking()


IN_ORDER = "sequential"
"""Sampling of Trainers that reads rows as they stand, as all other sides do: by itself they shuffle."""


def data_set(steps, batch):
    """The same rows as a data set of the datasets library."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": tokens(steps * batch).tolist()})


def trainer(steps, batch, make=model):
    """transformers.Trainer, everything else at its defaults."""
    from transformers import Trainer, TrainingArguments

    net, clock = make(), Clock()
    rows = data_set(steps, batch).map(lambda row: {"labels": row["input_ids"]})
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=batch, max_steps=steps, report_to="none", logging_first_step=True,
            train_sampling_strategy=IN_ORDER,
        )  # fmt: skip
        Trainer(net, arguments, train_dataset=rows, callbacks=[ticking(clock)]).train()
    return clock.figures(batch, net)


def sft(steps, batch, make=model, **options):
    """trl.SFTTrainer, everything else at its defaults (bf16 only where there is a GPU: it refuses it on a CPU)."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    net, clock = make(), Clock()
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(
            out,
            per_device_train_batch_size=batch,
            max_steps=steps,
            report_to="none",
            logging_first_step=True,
            train_sampling_strategy=IN_ORDER,
            max_length=LENGTH,
            bf16=torch.cuda.is_available(),
            **options,
        )
        SFTTrainer(
            net, args=arguments, train_dataset=data_set(steps, batch), processing_class=tokenizer,
            callbacks=[ticking(clock)],
        ).train()  # fmt: skip
    return clock.figures(batch, net)


if __name__ == "__main__":
    kind, steps, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    make = with_lora if kind.startswith("lora-") else model
    # by itself it computes activations twice, which takes longer and less memory: not the same work
    options = {"gradient_checkpointing": False} if kind == "lora-sft" else {}
    done = {"bare": bare, "trainer": trainer, "sft": sft}[kind.removeprefix("lora-")](steps, batch, make, **options)
    print(json.dumps(done))
