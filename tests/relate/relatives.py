"""Relatives of a tiny model, made from its weights, and models that are none."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def fresh(seed=0, **config):
    """A model of its own initialisation."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**CONFIG | config))


def copy(model):
    """The same weights again."""
    made = LlamaForCausalLM(model.config)
    made.load_state_dict(model.state_dict())
    return made


def text(seed, rows=64, length=24, words=96):
    """Ids [rows, length] of a language in which each word has a few successors (Zipfian), which `seed` chooses."""
    random = torch.Generator().manual_seed(seed)
    after = torch.stack([torch.randperm(words, generator=random)[:4] for _ in range(words)])
    ids = [torch.randint(0, words, (rows,), generator=random)]
    for _ in range(length - 1):
        choice = torch.multinomial(torch.tensor([0.5, 0.25, 0.15, 0.1]), rows, replacement=True, generator=random)
        ids.append(after[ids[-1], choice])
    return torch.stack(ids, 1)


def trained(model, language, steps=30, rate=1e-3):
    """A copy trained with Adam on `text(language)`."""
    made = copy(model).train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=rate)
    ids = text(language)
    for _ in range(steps):
        optimizer.zero_grad()
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return made


@torch.no_grad()
def merged(a, b):
    """The mean of two models."""
    made = copy(a)
    for ours, theirs in zip(made.parameters(), b.parameters(), strict=True):
        ours.lerp_(theirs, 0.5)
    return made


@torch.no_grad()
def pruned(model, share=0.7):
    """Without the smallest `share` of every matrix."""
    made = copy(model)
    for weight in made.parameters():
        if weight.dim() > 1:
            weight[weight.abs() < weight.abs().float().quantile(share)] = 0
    return made


@torch.no_grad()
def quantised(model, levels=127):
    """Matrices rounded to 8 bits by rows, stored as float again."""
    made = copy(model)
    for weight in made.parameters():
        if weight.dim() > 1:
            scale = weight.abs().amax(1, keepdim=True) / levels
            weight.copy_((weight / scale).round() * scale)
    return made


@torch.no_grad()
def permuted(model, seed=0, residual=True):
    """The same function with its channels and (with `residual`) the dimensions of its hidden state in another order."""
    made = copy(model)
    random = torch.Generator().manual_seed(seed)
    for layer in made.model.layers:
        order = torch.randperm(made.config.intermediate_size, generator=random)
        mlp = layer.mlp
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order].clone())
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[order].clone())
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order].clone())
    if residual:
        order = torch.randperm(made.config.hidden_size, generator=random)
        for name, weight in made.named_parameters():
            if weight.dim() == 1 or "o_proj" in name or "down_proj" in name:
                weight.copy_(weight[order].clone())
            else:
                weight.copy_(weight[:, order].clone())
    return made


@torch.no_grad()
def nudged(model, step=0.01, seed=0):
    """A copy with small random differences everywhere."""
    made = type(model)(model.config)
    made.load_state_dict(model.state_dict())
    random = torch.Generator().manual_seed(seed)
    for weight in made.parameters():
        weight.add_(step * torch.randn(weight.shape, generator=random))
    return made
