"""Tiny models that were really trained: a base on three kinds of text, and tuned ones on one kind each."""

import itertools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import graft.data
import graft.merge
from graft.verb import Job

LETTERS = "abcdefgh"
KINDS = {"up": "abcdefgh", "down": "hgfedcba", "jump": "acegbdfh"}
"""What follows a letter in a text of this kind: the next one of the circle."""


def text(kind, start, length=24):
    circle = itertools.cycle(KINDS[kind])
    line = "".join(itertools.islice(circle, length + 8))
    return line[start : start + length]


def texts(kind, count=8):
    return [text(kind, start) for start in range(count)]


def write_data(root: Path):
    """Data sets by name: each kind, and all of them; the dev split holds a few texts."""
    kinds = {name: texts(name) for name in KINDS} | {"all": [t for name in KINDS for t in texts(name)]}
    for name, lines in kinds.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        (root / f"{name}.train.jsonl").write_text('{"text": "abc"}\n')
    raw = {
        name: {
            "source": "jsonl",
            "path": f"{name}.train.jsonl",
            "dev": f"{name}.jsonl",
            "splits": {"dev": 0, "test": 0},
        }
        for name in kinds
    }
    return {name: graft.data.parse(value, ("data", name)) for name, value in raw.items()}


def tokenizer():
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: place + 2 for place, letter in enumerate(LETTERS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def model(**more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=10, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(made, lines, steps, rate, seed=0):
    torch.manual_seed(seed)
    rows = torch.tensor([[0, *(LETTERS.index(c) + 2 for c in line)] for line in lines])
    optimizer = torch.optim.AdamW(made.parameters(), lr=rate)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (8,))]
        optimizer.zero_grad()
        made(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return made.eval()


def save(made, folder):
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def family(root: Path):
    """`base`, one model tuned on each kind, and `wild`, which was tuned far too hard: name → folder."""
    base = train(model(), [t for kind in KINDS for t in texts(kind)], 40, 5e-3)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    folders = {"base": save(base, root / "base")}
    for number, (name, kind, steps, rate) in enumerate(
        [("up", "up", 12, 2e-3), ("down", "down", 12, 2e-3), ("jump", "jump", 12, 2e-3), ("wild", "up", 30, 5e-2)]
    ):
        base.load_state_dict(weights)
        folders[name] = save(train(base.train(), texts(kind), steps, rate, seed=number + 1), root / name)
    return folders


def job(settings, folders, data, root: Path, out: Path, seed=0):
    """A job for the verb, as the runner would make it."""
    from graft.settings import references

    parsed = graft.merge.VERB.parse(settings)
    scratch = out.parent / f"{out.name}.scratch"
    for folder in (out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    named = {name: folders[name] for kind, name, _ in references(parsed) if kind == "model"}
    return Job(out.name, parsed, seed, out, scratch, scratch, named, data, root)
