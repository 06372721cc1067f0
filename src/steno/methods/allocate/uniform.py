"""Uniform: every head of every layer keeps the same number of tokens.

Source: the rule of most eviction papers; the baseline of Ada-KV, Feng et al., 2024,
    https://arxiv.org/abs/2407.11550.
Differs: nothing to differ from.
Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.types import Need


@final
@dataclass(frozen=True, kw_only=True)
class Uniform:
    """The same budget for all; no parameters. The default."""

    id: ClassVar[str] = "uniform"
    kind: ClassVar[str] = "allocate"
    title: ClassVar[str] = "Uniform"
    paper: ClassVar[str] = "(the baseline of the field)"
    year: ClassVar[int] = 2023
    arxiv: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    across_layers: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    differs: ClassVar[str] = "Nothing to differ from."

    def allocate(self, scores: Tensor, *, budget_tokens: int, layer_idx: int, num_layers: int) -> Tensor:
        """Counts `[Hkv]` int64 from scores `[Hkv, S]`."""
        num_heads, num_tokens = scores.shape
        return torch.full((num_heads,), min(budget_tokens, num_tokens), dtype=torch.int64, device=scores.device)
