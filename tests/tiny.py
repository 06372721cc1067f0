"""Tiny seeded models of the architectures that the host promises to serve, with weights large enough to disagree."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
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


class Shape(NamedTuple):
    """Of a layer: KV heads, query heads of each, head dimension."""

    kv_heads: int
    group: int
    dim: int

    def __str__(self) -> str:
        return f"Hkv{self.kv_heads}-G{self.group}-D{self.dim}"


SHAPE = Shape(2, 2, 12)
"""That of the tiny llama."""
OTHER_SHAPES = [Shape(1, 1, 64), Shape(2, 3, 80), Shape(1, 8, 128)]


def llama_config(shape: Shape) -> LlamaConfig:
    """The tiny llama with layers of this shape."""
    heads = {"num_key_value_heads": shape.kv_heads, "num_attention_heads": shape.kv_heads * shape.group}
    return LlamaConfig(**{**SHARED, **heads, "head_dim": shape.dim})


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


SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_with_bytes(folder: Path, name: str, *, template: bool = True, positions: int = 1200) -> Path:
    """A model with a tokenizer of one token a byte, in a folder."""
    backend = Tokenizer(models.BPE({token: idx for idx, token in enumerate(TOKENS)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIALS[1], eos_token=SPECIALS[2], pad_token=SPECIALS[0]
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = build(name, vocab_size=len(TOKENS), max_position_embeddings=positions, eos_token_id=2)
    model.save_pretrained(folder)
    return folder
