"""Tiny mixtures of experts, made on the spot: experts as [e, o, i], as [e, i, o], with biases, and below each other."""

from __future__ import annotations

import torch
import transformers as hf

from .families import IDS, USUAL

WIDE = {**USUAL, "intermediate_size": 24, "num_key_value_heads": 2}
MIXTURES = {
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {**WIDE, "num_local_experts": 4}),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig,
                  {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4}),
    "gpt_oss": (hf.GptOssForCausalLM, hf.GptOssConfig,
                {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "intermediate_size": 12,
                 "attn_implementation": "eager"}),
    "granitemoe": (hf.GraniteMoeForCausalLM, hf.GraniteMoeConfig,
                   {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config,
                    {**WIDE, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
                     "moe_intermediate_size": 12, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
                     "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
                     "v_head_dim": 4}),
    "llama4": (hf.Llama4ForCausalLM, hf.Llama4TextConfig,
               {**WIDE, "num_local_experts": 4, "head_dim": 4, "intermediate_size_mlp": 24,
                "interleave_moe_layer_step": 1}),
    "dbrx": (hf.DbrxForCausalLM, hf.DbrxConfig,
             {"vocab_size": 60, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
              "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
              "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}, **IDS}),
    "jetmoe": (hf.JetMoeForCausalLM, hf.JetMoeConfig,
               {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8,
                "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, **IDS}),
}  # fmt: skip
"""jetmoe has experts in attention, too, whose matrices are square."""

CHOOSE = [name for name in MIXTURES if name not in ("llama4", "dbrx", "jetmoe")]
"""Those that let `transformers` choose how experts are computed."""


@torch.no_grad()
def mixture(name: str, how: str | None = None) -> hf.PreTrainedModel:
    """A model of its own; the same weights each time, large enough for experts to differ."""
    cls, config, settings = MIXTURES[name]
    model = cls(config(**settings)).eval()
    generator = torch.Generator().manual_seed(3)
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1 or path.endswith(("bias", "sinks")):
            parameter.normal_(0, 0.15, generator=generator)
    if how is not None:
        model.set_experts_implementation(how)
    return model
