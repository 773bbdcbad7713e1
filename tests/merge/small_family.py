"""Folders of tiny random Llama models of one initialisation, and a merge of them without a recipe."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import graft.merge
from graft.settings import references
from graft.verb import Job

CONFIG = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tokenizer(words=48):
    vocab = {f"w{i}": i for i in range(words)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w0", eos_token="w2")


def model(seed=0, *, near=None, step=0.02, **config):
    """Random weights; with `near`, those of another model with small differences."""
    torch.manual_seed(seed)
    made = LlamaForCausalLM(LlamaConfig(**CONFIG | config))
    if near is not None:
        made.load_state_dict(near.state_dict())
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(step * torch.randn_like(weight))
    return made.eval()


def save(made, folder, words=48, dtype=None, **options):
    made.to(dtype).save_pretrained(folder, **options) if dtype else made.save_pretrained(folder, **options)
    tokenizer(words).save_pretrained(folder)
    return folder


def family(root: Path, count=3, **config):
    """`base` and `a`, `b`, `c`, …: name → folder."""
    base = model(0, **config)
    named = {"base": base} | {"abcdefgh"[i]: model(i + 1, near=base, **config) for i in range(count)}
    return {name: save(made, root / name) for name, made in named.items()}


def merge(settings, folders, out, seed=0, device=None):
    """Run the verb; (tensors of the output, what it returned)."""
    parsed = graft.merge.VERB.parse(settings)
    scratch = out.parent / f"{out.name}.scratch"
    for folder in (out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    named = [name for kind, name, _ in references(parsed) if kind == "model"]
    models = {n: folders[n] for n in named}
    found = graft.merge.VERB.run(Job(out.name, parsed, seed, out, scratch, scratch, models, {}, device=device))
    return tensors(out), found


def with_nan(folder, out, ending):
    """A copy of a folder with one file of weights; the last value of a tensor whose name ends so is NaN."""
    copy = Path(shutil.copytree(folder, out))
    (file,) = copy.glob("*.safetensors")
    held = load_file(file)
    name = next(name for name in sorted(held) if name.endswith(ending))
    held[name].view(-1)[-1] = float("nan")
    save_file(held, file, metadata={"format": "pt"})
    return copy


def tensors(folder):
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}
