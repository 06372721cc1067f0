"""One threshold: the heads of all layers compete for one budget, so tokens go where the scores of the whole model are highest.

Source: Kim, Kim, Kwon, Lee, Yun, Song, KVzip, 2025, https://arxiv.org/abs/2505.23416, section 3 (its non-uniform budgets); the
    authors' code.
Differs: exactly the budget is kept, not the scores strictly above one of them, and of every head at least its best token; for
    any scorer whose scores can be compared between layers. `unit`, whole pages for every head, is ours.
Cost: one sort of L*Hkv*S scores. All layers stay dense until the last is read, as a replay needs anyway.
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
class OneThreshold:
    """Budgets by the number of a head's tokens among the best of the model.

    Parameters
    ----------
    unit : int, default 1 token
        Every head keeps a multiple of this: its tokens stand in line by score, and runs of `unit` compete by their mean.
        With 64, a page, a quantize stage leaves no remainder dense. 1 where not even the protected tokens fit whole runs.

    Raises
    ------
    BadArgument
        If `unit` is not a whole number >= 1.
    """

    id: ClassVar[str] = "one_threshold"
    kind: ClassVar[str] = "allocate"
    title: ClassVar[str] = "KVzip's one threshold"
    paper: ClassVar[str] = "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2505.23416"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    across_layers: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "Exactly the budget is kept, not the scores strictly above one of them, and of every head at least its best token; for "
        "any scorer; whole pages for every head, with `unit`, are ours."
    )

    unit: int = 1

    def __post_init__(self) -> None:
        require_int("unit", self.unit, 1)

    def allocate(self, scores: Tensor, *, budget_tokens: int, layer_idx: int, num_layers: int) -> Tensor:
        """Counts `[N]` int64 from scores `[N, S]` of the heads of all layers; their mean is the budget, rounded down to runs."""
        num_heads, num_tokens = scores.shape
        total = min(budget_tokens, num_tokens) * num_heads
        protected = torch.isposinf(scores).sum(-1).clamp(min=1)  # [N], or the best one
        if int(protected.sum()) > total:
            return torch.full_like(protected, min(budget_tokens, num_tokens))
        unit = self.unit
        least = (protected + unit - 1) // unit  # [N], runs
        if int(least.max()) > num_tokens // unit or int(least.sum()) > total // unit:
            unit = 1
        line = scores.sort(dim=1, descending=True).values[:, : num_tokens // unit * unit]
        runs = line.unflatten(1, (-1, unit)).mean(-1)  # [N, runs], descending
        runs[:, 0] = torch.inf
        best = runs.T.flatten().argsort(descending=True, stable=True)[: total // unit]  # ties: each head's better run
        return unit * (best % num_heads).bincount(minlength=num_heads)
