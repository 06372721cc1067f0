"""Tiny seeded vision-language models, built from their configurations, and prompts with images."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from tiny import SHARED, VOCAB

IMAGE, VIDEO, START, END = 5, 6, 3, 4
IMAGE_TOKENS = 16  # of one image or frame
BEFORE, AFTER = 7, 17  # tokens of text


def _llava(shape: dict[str, Any]) -> Any:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = LlamaConfig(**shape)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=IMAGE_TOKENS)
    )


def _qwen2_vl(shape: dict[str, Any]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": shape["hidden_size"], "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**shape, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE,
            video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        )
    )  # fmt: skip


BUILDERS = {"llava": _llava, "qwen2_vl": _qwen2_vl}


def build(name: str, **overrides: object) -> Any:
    """A fresh model in eval mode, fp32, with weights large enough to disagree; `overrides` go to its language model."""
    torch.manual_seed(0)
    model = BUILDERS[name]({**SHARED, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.6 / parameter.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@lru_cache
def vlm(name: str) -> Any:
    """One model per family for tests that do not change it."""
    return build(name)


def show(model: Any, pixels: Tensor) -> None:
    """Lets a llava see these images, one for each `IMAGE_TOKENS` image tokens that it reads, without being given them."""

    def beside(module: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
        count = int((args[0] == IMAGE).sum()) // IMAGE_TOKENS
        return args, {**kwargs, "pixel_values": pixels[:count] if count else None}

    model.register_forward_pre_hook(beside, with_kwargs=True)


def inputs(name: str, *, images: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """A prompt of text, `images` random images and text, as the model's processor would give it."""
    g = torch.Generator().manual_seed(seed)
    one = torch.cat([torch.tensor([START]), torch.full((IMAGE_TOKENS,), IMAGE), torch.tensor([END])])
    text = torch.randint(7, VOCAB, (BEFORE + AFTER,), generator=g)
    ids = torch.cat([text[:BEFORE], one.repeat(images), text[BEFORE:]])[None]
    if name == "llava":
        pixels = torch.randn(images, 3, 16, 16, generator=g)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    pixels = torch.randn(images * 4 * IMAGE_TOKENS, 3 * 2 * 4 * 4, generator=g)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 8, 8]] * images),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }
