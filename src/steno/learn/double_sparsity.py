"""The channels of Double Sparsity: in which the products of queries and keys are largest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steno.learn.gather import look
from steno.learn.options import Options
from steno.learn.pieces import pieces
from steno.methods.access.double_sparsity import IMPORTANCE, channel_importance
from steno.session import LanguageModel
from steno.types import Need

PIECES, PIECE_TOKENS = 16, 512


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """`channel_importance` `[L, Hkv, D]` fp32, the mean over pieces of the text."""
    parts = pieces(lm, text, count=PIECES, size=PIECE_TOKENS, seed=options.seed)
    total: Tensor | float = 0.0
    for number, tokens in enumerate(parts):
        options.report("reading", number, len(parts))
        total = total + torch.stack([channel_importance(*seen) for seen in look(lm, tokens, Need.QUERIES)])
    options.report("reading", len(parts), len(parts))
    assert isinstance(total, Tensor)
    return {IMPORTANCE: total / len(parts)}
