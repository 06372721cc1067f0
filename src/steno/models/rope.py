"""The rotary embedding of a model from its configuration, for methods that look at queries before rotation."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from steno.errors import UnsupportedAttention
from steno.types import Rope

# families whose rotation pairs neighbouring channels instead of the two halves
INTERLEAVED = frozenset(
    {"cohere", "cohere2", "glm", "glm4", "gptj", "codegen", "ernie4_5", "ernie4_5_moe", "llama4_text", "deepseek_v2"}
)


def rope_of(config: Any, layer_type: str, device: torch.device) -> Rope | None:
    """The rotation of one layer; None for a model without rotary positions.

    Raises UnsupportedAttention if the model rotates in a way that cannot be undone here.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return None
    if config.model_type in INTERLEAVED:
        raise UnsupportedAttention(
            f"methods that need queries before rotation know the half-split rotation only; {config.model_type} interleaves."
        )
    nested = "rope_type" not in parameters and layer_type in parameters
    own: dict[str, Any] = parameters[layer_type] if nested else parameters
    if own.get("mrope_section"):
        raise UnsupportedAttention(
            "methods that need queries before rotation know one position a token; this model rotates by time, height and width."
        )
    kind = own.get("rope_type", "default")
    if kind == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotated = int(head_dim * own.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
        return Rope(inv_freq=1.0 / own["rope_theta"] ** exponents)
    if kind not in ROPE_INIT_FUNCTIONS or kind in ("dynamic", "longrope"):
        raise UnsupportedAttention(f"methods that need queries before rotation do not know the rotation {kind!r}.")
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, device, layer_type=layer_type if nested else None)
    return Rope(inv_freq=inv_freq, attention_scaling=float(scaling))
