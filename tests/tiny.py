"""Tiny seeded models of the architectures that the host promises to serve, with weights large enough to disagree."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 97
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHARED),
    "qwen2": lambda: Qwen2Config(**SHARED),
    "qwen3": lambda: Qwen3Config(**SHARED, head_dim=16),
    "mistral": lambda: MistralConfig(**SHARED, sliding_window=12, head_dim=12),
    "gemma2": lambda: Gemma2Config(
        **SHARED, head_dim=16, sliding_window=12, query_pre_attn_scalar=20, attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SHARED, head_dim=16, sliding_window=12, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3Config(**SHARED),
    "mixtral": lambda: MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=2, head_dim=12),
    "gpt_oss": lambda: GptOssConfig(
        **SHARED, head_dim=16, sliding_window=12, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
}  # fmt: skip


def build(name: str, seed: int = 0, **overrides: object) -> torch.nn.Module:
    """A fresh model in eval mode, fp32."""
    config = CONFIGS[name]()
    for key, value in overrides.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.6 / parameter.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@lru_cache
def shared(name: str) -> torch.nn.Module:
    """One model per architecture for tests that do not change it."""
    return build(name)


def prompt(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Token ids `[rows, length]` without the padding token."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
