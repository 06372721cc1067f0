"""Ada-KV: the heads of a layer compete for one budget, so those that spread their attention get more.

Source: Feng, Lv, Cao, Xie, Zhou, 2024, https://arxiv.org/abs/2407.11550, algorithm 1; the authors' code.
Differs: counts are rounded by largest remainder instead of each by itself, so the layer keeps exactly its budget;
    heads are KV heads; works on any scorer whose heads can be compared, where the authors fix SnapKV's scores.
Cost: one sort of Hkv*S scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.allocate.rounding import largest_remainder
from steno.methods.checks import require_real
from steno.types import Need


@final
@dataclass(frozen=True, kw_only=True)
class AdaKV:
    """Budgets by the number of a head's tokens among the best of the layer, with a floor.

    Parameters
    ----------
    alpha_safeguard : float, default 0.2 of the budget
        Share of the budget beyond the protected tokens that every head gets; 1 is uniform.

    Raises
    ------
    BadArgument
        If `alpha_safeguard` is not a number between 0 and 1.
    """

    id: ClassVar[str] = "adakv"
    kind: ClassVar[str] = "allocate"
    title: ClassVar[str] = "Ada-KV"
    paper: ClassVar[str] = (
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference"
    )
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2407.11550"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    across_layers: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    by_head: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Counts are rounded by largest remainder, so the layer keeps exactly its budget; heads are KV heads; "
        "works on any scorer whose heads can be compared."
    )

    alpha_safeguard: float = 0.2

    def __post_init__(self) -> None:
        require_real("alpha_safeguard", self.alpha_safeguard, 0, 1)

    def allocate(self, scores: Tensor, *, budget_tokens: int, layer_idx: int, num_layers: int) -> Tensor:
        """Counts `[Hkv]` int64 from scores `[Hkv, S]`."""
        num_heads, num_tokens = scores.shape
        protected = torch.isposinf(scores).sum(-1)  # [Hkv]
        spare = min(budget_tokens, num_tokens) * num_heads - int(protected.sum())
        if spare <= 0:
            return torch.full_like(protected, min(budget_tokens, num_tokens))
        counts = _winners(scores, protected, spare)
        shares = (1 - self.alpha_safeguard) * counts.double() + self.alpha_safeguard * spare / num_heads  # [Hkv]
        room = num_tokens - protected
        return protected + torch.tensor(largest_remainder(shares.tolist(), room.tolist(), spare), device=scores.device)


def _winners(scores: Tensor, protected: Tensor, count: int) -> Tensor:
    """How many of the best `count` unprotected scores of the layer belong to each head `[Hkv]`; ties: earlier token."""
    num_heads = scores.shape[0]
    order = scores.T.flatten().argsort(descending=True, stable=True)  # [S * Hkv], token-major
    heads = order[: int(protected.sum()) + count] % num_heads
    return heads.bincount(minlength=num_heads) - protected
