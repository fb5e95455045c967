"""Tiny random Mixtral configurations that differ where implementations go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

# Each overrides BASE. Odd head counts, GQA 1 to 8, 2 to 16 experts, top-1 to top-4, a window shorter than the prompt,
# tied and untied embeddings, head_dim that is not hidden_size / num_attention_heads.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd_heads": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},
    "mha": {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8, "hidden_size": 40},
    "gqa8": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 4},
    "experts2_top1": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "experts16_top4": {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 24},
    "experts5_top3": {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 17},
    "window": {"sliding_window": 7},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 24, "num_attention_heads": 3, "num_key_value_heads": 3},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6},
}

BASE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def make(variant: str, folder: Path) -> MixtralForCausalLM:
    """A random float32 model of the variant, saved to `folder`; weights large enough that routing and logits vary."""
    torch.manual_seed(sum(map(ord, variant)))
    config = MixtralConfig(**(BASE | VARIANTS[variant]), attn_implementation="eager", experts_implementation="eager")
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return model
