"""Small models that have learned something: a base, and one tuned on each of three kinds of text; with the text."""

import json
from pathlib import Path

import torch
from small_family import tensors
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import graft.data
import graft.merge
from graft import models
from graft.settings import references
from graft.verb import Job

KINDS = {"low": (4, 5), "middle": (16, 7), "high": (28, 11)}
"""First of twelve words, and how far on the circle of these the next word is."""
NAMES = list(KINDS)
ON = {kind: f"{kind}.train" for kind in KINDS}
LENGTH = 17
"""Tokens of a text with its end: a row."""


def save(made, folder):
    """A model's folder with the tokenizer of these texts."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"word{token}": token for token in range(3, 48)}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


def line(kind, start):
    """Token ids of one text."""
    first, step = KINDS[kind]
    return [first + (start + i * step) % 12 for i in range(LENGTH - 1)]


def text_rows(kind):
    """The rows that are read for a kind: texts with their end, in any order."""
    return [torch.tensor([*line(kind, start), 2]) for start in range(12)]


def mean(folders, name):
    """A tensor's mean over the models, float64."""
    return sum(tensors(folders[kind])[name].double().numpy() for kind in KINDS) / len(KINDS)


def rows(kind):
    """[12, 16] token ids: every text there is of a kind."""
    return torch.tensor([line(kind, start) for start in range(12)])


def write_data(root: Path):
    """Data sets by name: each kind, `KIND-most` of it (the first eight texts), and `all` together."""
    kinds = {kind: rows(kind).tolist() for kind in KINDS}
    sets = {
        "all": [each for lines in kinds.values() for each in lines],
        **kinds,
        **{f"{kind}-most": lines[:8] for kind, lines in kinds.items()},
    }
    for name, lines in sets.items():
        texts = [" ".join(f"word{token}" for token in each) for each in lines]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    raw = {"source": "jsonl", "splits": {"dev": 0, "test": 0}}
    return {name: graft.data.parse(raw | {"path": f"{name}.jsonl"}, ("data", name)) for name in sets}


def train(made, kinds, steps, rate, seed):
    torch.manual_seed(seed)
    read = torch.cat([rows(kind) for kind in kinds])
    adam = torch.optim.AdamW(made.parameters(), lr=rate)
    for _ in range(steps):
        batch = read[torch.randint(len(read), (16,))]
        adam.zero_grad()
        made(input_ids=batch, labels=batch).loss.backward()
        adam.step()
    return made.eval()


def model(**config):
    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **special, **config))


def family(root: Path, steps=60):
    """`base`, which has seen a little of everything, and a model tuned on each kind, named as that: name → folder."""
    base = train(model(), list(KINDS), 20, 3e-3, 0)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    folders = {"base": save(base, root / "base")}
    for seed, kind in enumerate(KINDS, 1):
        base.load_state_dict(start)
        folders[kind] = save(train(base.train(), [kind], steps, 3e-3, seed), root / kind)
    return folders


def loss(folder, kind):
    """Mean loss a token of the model in a folder on a kind of text."""
    with torch.no_grad():
        return float(models.load(folder)(input_ids=rows(kind), labels=rows(kind)).loss)


def losses(folder):
    return sum(loss(folder, kind) for kind in KINDS) / len(KINDS)


def job(settings, folders, data, root: Path, out: Path, seed=0):
    """A job for the verb, as a run would make it."""
    parsed = graft.merge.VERB.parse(settings)
    scratch, cache = out.parent / f"{out.name}.scratch", root / "cache"
    for folder in (out, scratch, cache):
        folder.mkdir(parents=True, exist_ok=True)
    named = {name: folders[name] for kind, name, _ in references(parsed) if kind == "model"}
    return Job(out.name, parsed, seed, out, scratch, cache, named, data, root, device="cpu")
