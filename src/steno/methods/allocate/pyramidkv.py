"""PyramidKV: lower layers spread their attention, higher layers funnel it, so the budget falls from layer to layer.

Source: Cai, Zhang, Gao, Liu, Li, Liu, Lu, Xiong, Dong, Chang, Hu, Xiao, 2024, https://arxiv.org/abs/2406.02069,
    section 4; the authors' code.
Differs: the allocation only, for any scorer, where the paper fixes SnapKV's; the window is what the scorer
    protects. A model of one layer gets the plain budget. As in the authors' code steps are whole tokens, so all
    layers together may keep up to (L - 1) / 2 tokens per layer more than the budget.
Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.checks import require_int
from steno.types import Need


@final
@dataclass(frozen=True, kw_only=True)
class PyramidKV:
    """Budgets that fall linearly with the layer.

    Parameters
    ----------
    beta : int, default 20
        Steepness: the last layer gets about 1/beta of the mean budget beyond the window; 1 is uniform.

    Raises
    ------
    BadArgument
        If `beta` is not a whole number >= 1.
    """

    id: ClassVar[str] = "pyramidkv"
    kind: ClassVar[str] = "allocate"
    title: ClassVar[str] = "PyramidKV"
    paper: ClassVar[str] = "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2406.02069"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    across_layers: ClassVar[bool] = False
    by_layer: ClassVar[bool] = True
    by_head: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "The allocation only, for any scorer; whole-token steps, as in the authors' code, "
        "may keep up to (L - 1) / 2 tokens per layer more than the budget."
    )

    beta: int = 20

    def __post_init__(self) -> None:
        require_int("beta", self.beta, 1)

    def allocate(self, scores: Tensor, *, budget_tokens: int, layer_idx: int, num_layers: int) -> Tensor:
        """Counts `[Hkv]` int64 from scores `[Hkv, S]`."""
        num_heads, num_tokens = scores.shape
        window = int(torch.isposinf(scores).sum(-1).amax())
        count = self.layer_budget(num_tokens, window, budget_tokens, layer_idx, num_layers)
        return torch.full((num_heads,), min(count, num_tokens), dtype=torch.int64, device=scores.device)

    def layer_budget(self, num_tokens: int, window: int, budget_tokens: int, layer_idx: int, num_layers: int) -> int:
        """Tokens per KV head that this layer keeps, the `window` protected ones included."""
        past = budget_tokens - window
        if num_layers == 1 or past <= 0 or num_tokens < 2 * past:
            return budget_tokens
        low = past // self.beta
        high = min(2 * past - low, num_tokens - window)
        low = 2 * past - high
        return window + high - layer_idx * ((high - low) // (num_layers - 1))
