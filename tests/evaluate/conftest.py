"""A byte-level tokenizer and tiny models of real architectures."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from graft.adapters import adapters_of, adopt
from graft.adapters.point import Mixture, Point
from graft.ensemble.model import ensemble_of
from graft.tune import lora

SIZE = 259
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="session")
def tokenizer():
    """Every byte is a token, so that lengths and boundaries are known by hand."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place + 3 for place, letter in enumerate(letters)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _louder(model):
    """Random models are nearly uniform; larger weights make their predictions differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


def make(kind):
    torch.manual_seed(0)
    small = {"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, **IDS}
    if kind == "llama":
        return _louder(LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=2, max_position_embeddings=400)))
    if kind == "mixture":  # reads each text twice
        model = make("llama")
        for name in "ab":
            adopt(model, lora.points(lora.Settings(rank=2)), name)
        adopt(model, [Point(form="mixture", on=["adapters"], of=["a", "b"], mixture=Mixture(layerwise=True))], "mix")
        with torch.no_grad():
            for weight in adapters_of(model).parameters():
                weight.normal_(std=0.1)
        return model.eval()
    if kind == "gpt2":
        return _louder(
            GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=24, n_layer=2, n_head=2, n_positions=400, **IDS))
        )
    if kind == "sliding":
        config = MistralConfig(**small, num_hidden_layers=1, num_key_value_heads=2, sliding_window=16)
        return _louder(MistralForCausalLM(config))
    if kind == "bloom":
        return _louder(BloomForCausalLM(BloomConfig(vocab_size=SIZE, hidden_size=32, n_layer=2, n_head=4, **IDS)))
    if kind == "mpt":
        return _louder(
            MptForCausalLM(MptConfig(vocab_size=SIZE, d_model=32, n_layers=2, n_heads=4, max_seq_len=400, **IDS))
        )
    if kind == "gptj":
        config = GPTJConfig(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=400, **IDS)
        return _louder(GPTJForCausalLM(config))
    if kind == "gptneo":  # every other layer looks back eight tokens
        layers = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8}
        config = GPTNeoConfig(
            vocab_size=SIZE, hidden_size=32, num_heads=4, max_position_embeddings=400, **layers, **IDS
        )
        return _louder(GPTNeoForCausalLM(config))
    if kind == "mamba":
        config = MambaConfig(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, state_size=8, **IDS)
        return _louder(MambaForCausalLM(config))
    if kind == "convolution":
        layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}
        return _louder(Lfm2ForCausalLM(Lfm2Config(**small, **layers, block_multiple_of=8)))
    if kind == "gpt1":  # knows no cache
        config = OpenAIGPTConfig(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=400)
        return _louder(OpenAIGPTLMHeadModel(config))
    if kind == "t5":
        config = T5Config(
            vocab_size=SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        config.eos_token_id, config.pad_token_id = 2, 0
        return _louder(T5ForConditionalGeneration(config))
    return ensemble_of({"a": make("llama"), "b": make("gpt2")}, [0.6, 0.4])


@pytest.fixture(scope="session")
def model_of():
    made = {}
    return lambda kind: made.setdefault(kind, make(kind))
