"""Tiny models of many architectures, made on the spot, with fresh random weights."""

from __future__ import annotations

from functools import cache

import torch
import transformers as hf

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
USUAL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
WIDE = {**USUAL, "intermediate_size": 24}
TRANSLATOR = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64, **IDS,
    "decoder_start_token_id": 1,
}  # fmt: skip

CLASSES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {**WIDE, "num_key_value_heads": 2}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config,
             {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig,
            {**USUAL, "ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 64}),
    "neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, WIDE),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, WIDE),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {**WIDE, "num_key_value_heads": 2, "num_local_experts": 2}),
    "mpt": (hf.MptForCausalLM, hf.MptConfig,
            {"vocab_size": 60, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "mamba": (hf.MambaForCausalLM, hf.MambaConfig,
              {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **IDS}),
    "afmoe": (hf.AfmoeForCausalLM, hf.AfmoeConfig,
              {**WIDE, "num_key_value_heads": 2, "head_dim": 4, "moe_intermediate_size": 8, "num_experts": 2,
               "num_experts_per_tok": 1, "num_dense_layers": 1}),
    "deepseek": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config,
                 {**WIDE, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
                  "v_head_dim": 4, "head_dim": 4, "moe_intermediate_size": 8, "n_routed_experts": 2, "n_group": 1,
                  "topk_group": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    "dbrx": (hf.DbrxForCausalLM, hf.DbrxConfig,
             {"vocab_size": 60, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, **IDS,
              "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 2, "moe_top_k": 1},
              "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}),
    "qwen3_next": (hf.Qwen3NextForCausalLM, hf.Qwen3NextConfig,
                   {**WIDE, "num_key_value_heads": 2, "head_dim": 4, "num_experts": 2, "num_experts_per_tok": 1,
                    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                    "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
                    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}),
    "llama4": (hf.Llama4ForCausalLM, hf.Llama4TextConfig,
               {**WIDE, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size_mlp": 24, "num_local_experts": 2}),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, {**WIDE, "max_position_embeddings": 64}),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig,
                {**WIDE, "pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 64}),
    "modernbert": (hf.ModernBertForMaskedLM, hf.ModernBertConfig,
                   {**WIDE, "cls_token_id": 1, "sep_token_id": 2, "reference_compile": False}),
    "albert": (hf.AlbertForMaskedLM, hf.AlbertConfig, {**WIDE, "embedding_size": 8, "max_position_embeddings": 64}),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config,
           {"vocab_size": 60, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 4, "d_kv": 4,
            "decoder_start_token_id": 0}),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig, TRANSLATOR),
}  # fmt: skip
"""Decoders with linear layers apart and fused, with and without biases, with experts; encoders; translators.

The attention of `afmoe` has a gate as wide as its output, that of `deepseek` goes through few channels, and of
`qwen3_next` one block is recurrent; the first block of `afmoe` and `deepseek` is dense, a router of `dbrx` is linear.
"""


@cache
def _made(name: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    cls, config, settings = CLASSES[name]
    return cls(config(**settings)).eval()


def family(name: str) -> hf.PreTrainedModel:
    """A model of its own; the same weights each time."""
    model = _made(name)
    fresh = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


def inputs(model: hf.PreTrainedModel, rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Tokens for one call of the model."""
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@torch.no_grad()
def logits(model: hf.PreTrainedModel, **more: torch.Tensor) -> torch.Tensor:
    """What the model gives for `inputs`."""
    return model(**(inputs(model) | more)).logits


@torch.no_grad()
def moved(model: hf.PreTrainedModel, size: float = 0.1) -> None:
    """Move all trainable weights at random, as training would."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
