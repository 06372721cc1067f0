"""Which tokens of a prompt are image or video tokens, from the model's configuration and the prompt's ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steno.errors import BadArgument, ModelError

NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""What configurations call the ids of tokens that stand for patches."""
PARTS = ("vision_config", "vq_config", "thinker_config")
"""What they call the part of a model that sees."""


def takes_images(config: Any) -> bool:
    """Whether prompts of the model may hold image tokens: its configuration names them, or a part that sees."""
    return bool(_ids(config)) or any(getattr(config, name, None) is not None for name in PARTS)


def image_tokens(config: Any, input_ids: Tensor) -> Tensor:
    """`[B, T]` bool from ids `[B, T]`.

    Raises
    ------
    ModelError
        If the configuration names no such token.
    BadArgument
        If the ids are not of that shape.
    """
    ids = _ids(config)
    if not ids:
        raise ModelError(
            f"this recipe looks at image tokens, and {type(config).__name__} names none ({', '.join(NAMES)}): pass the "
            "configuration of the whole vision-language model, model.config, or use another recipe."
        )
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
        raise BadArgument(
            f"`input_ids` must be the prompt, int64 of shape [B, T]; got {input_ids.dtype} of {list(input_ids.shape)}."
        )
    return torch.isin(input_ids, torch.tensor(sorted(ids), device=input_ids.device))


def _ids(config: Any) -> set[int]:
    return {i for name in NAMES if isinstance(i := getattr(config, name, None), int)}
