"""Tiny random members of different architecture, depth and width over one vocabulary, and brute-force references."""

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from graft.adapters import adapters_of, adopt
from graft.adapters.point import Mixture, Point
from graft.tune import lora

TOKENS = 37
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def sharp(model, seed):
    """Random weights wide enough that predictions differ from token to token."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.4)
    return model.eval()


def llama(seed=0, tokens=TOKENS, layers=2, **settings):
    own = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
    return sharp(
        LlamaForCausalLM(LlamaConfig(vocab_size=tokens, num_hidden_layers=layers, **own, **ENDS | settings)), seed
    )


def qwen(seed=1):
    own = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return sharp(Qwen2ForCausalLM(Qwen2Config(vocab_size=TOKENS, num_hidden_layers=1, **own, **ENDS)), seed)


def mistral(seed=2):
    """Sees only the last four tokens in each layer."""
    own = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=TOKENS, num_hidden_layers=3, sliding_window=4, **own, **ENDS)
    return sharp(MistralForCausalLM(config), seed)


def gpt2(seed=3):
    """Learned positions: right only where positions are counted without the padding."""
    return sharp(
        GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_embd=24, n_layer=2, n_head=2, n_positions=64, **ENDS)), seed
    )


def bloom(seed=4):
    """ALiBi: positions come from the attention mask."""
    return sharp(BloomForCausalLM(BloomConfig(vocab_size=TOKENS, hidden_size=16, n_layer=1, n_head=2, **ENDS)), seed)


def five():
    return {"llama": llama(), "qwen": qwen(), "mistral": mistral(), "gpt2": gpt2(), "bloom": bloom()}


def prompts(rows=3, length=7, padded=(3, 1, 0)):
    """Token ids and mask, left-padded by so many tokens a row."""
    torch.manual_seed(7)
    ids = torch.randint(3, TOKENS, (rows, length))
    mask = torch.ones_like(ids)
    for row, count in enumerate(padded):
        ids[row, :count] = 0
        mask[row, :count] = 0
    return ids, mask


def greedy(probabilities, ids, steps):
    """The most probable next token, again and again, without any cache; `probabilities(ids)` of the next token."""
    for _ in range(steps):
        ids = torch.cat([ids, probabilities(ids).argmax(-1)[:, None]], 1)
    return ids


def mixed(model, seed=0):
    """`model` with two random experts, mixed by a random classifier that sees a difference between tokens."""
    torch.manual_seed(seed)
    for name in "ab":
        adopt(model, lora.points(lora.Settings(rank=2)), name)
    adopt(model, [Point(form="mixture", on=["adapters"], of=["a", "b"], mixture=Mixture(layerwise=True))], "mix")
    with torch.no_grad():
        for weight in adapters_of(model).parameters():
            weight.normal_(std=0.4)
    return model.eval()
