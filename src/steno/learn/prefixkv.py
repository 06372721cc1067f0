"""The profile of PrefixKV: how much of its attention each layer holds with its best tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steno.errors import PromptError
from steno.learn.gather import look
from steno.learn.options import Options
from steno.methods.allocate.prefixkv import POINTS
from steno.session import LanguageModel
from steno.types import Need

PIECES = 4
PIECE_TOKENS = 512
MIN_TOKENS = 64


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """`curves` `[L, 101]` fp16, the mean over pieces of the text."""
    tokens = lm.tokenize(text)
    if len(tokens) < MIN_TOKENS:
        raise PromptError(f"calibration needs at least {MIN_TOKENS} tokens of text; got {len(tokens)}.")
    size = min(PIECE_TOKENS, len(tokens), lm.loaded.max_positions or PIECE_TOKENS)
    count = min(PIECES, len(tokens) // size)
    curves = []
    for piece in range(count):
        options.report("reading", piece, count)
        first = piece * (len(tokens) // count)
        seen = look(lm, tokens[first : first + size], Need.ATTENTION_MASS)
        masses = [o.attention_mass for _, o in seen if o.attention_mass is not None]
        curves.append(torch.stack([curve(mass.mean(0)) for mass in masses]))
    options.report("reading", count, count)
    return {"curves": torch.stack(curves).mean(0).half()}


def curve(mass: Tensor) -> Tensor:
    """Share of `mass` `[S]` in the best tokens, at POINTS equal steps from none to all; linear between two tokens."""
    held = mass.double().sort(descending=True).values.cumsum(0)
    held = torch.cat([held.new_zeros(1), held / held[-1]])  # [S + 1]
    places = torch.linspace(0, len(mass), POINTS, dtype=torch.float64, device=mass.device)
    below = places.long().clamp(max=len(mass) - 1)
    return held[below] + (held[below + 1] - held[below]) * (places - below)
