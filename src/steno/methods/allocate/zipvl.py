"""ZipVL's adaptive ratio: a layer keeps as many tokens as hold a share tau of its attention, so the prompt decides.

Source: He, Chen, Liu, Shao, Zhou, Zhang, Zhuang, 2024, https://arxiv.org/abs/2410.08584, the second version, which drops what is
    not important; there is no code.
Differs: the allocation only, for any scorer of attention that adds up, such as `h2o(heavy_share=1)`, where ZipVL looks at probe
    queries and ranks by the mean over the queries that see a token; the recipe's budget is a ceiling, below which tau
    decides; a budget of 100% keeps everything. Attention of the prefill stays full. tau is the paper's as remembered.
Cost: one sort of S scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.checks import require_real
from steno.types import Need


@final
@dataclass(frozen=True, kw_only=True)
class ZipVL:
    """The smallest number of tokens that hold tau of the layer's score; never more than the budget.

    Parameters
    ----------
    tau : float, default 0.975
        Share of the score that is kept.

    Raises
    ------
    BadArgument
        If `tau` is not a number between 0 and 1.
    """

    id: ClassVar[str] = "zipvl"
    kind: ClassVar[str] = "allocate"
    title: ClassVar[str] = "ZipVL, adaptive ratio (reconstruction)"
    paper: ClassVar[str] = (
        "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression"
    )
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2410.08584"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    across_layers: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "The allocation only, for any scorer whose scores add up; the budget is a ceiling, below which tau decides. "
        "Attention of the prefill stays full; tau is the paper's as remembered."
    )

    tau: float = 0.975

    def __post_init__(self) -> None:
        require_real("tau", self.tau, 0, 1)

    def allocate(self, scores: Tensor, *, budget_tokens: int, layer_idx: int, num_layers: int) -> Tensor:
        """Counts `[Hkv]` int64 from scores `[Hkv, S]`, the same for all heads."""
        num_heads, num_tokens = scores.shape
        protected = int(torch.isposinf(scores).sum(-1).amax())
        count = min(protected + tokens_for_share(scores, self.tau), budget_tokens, num_tokens)
        return torch.full((num_heads,), count, dtype=torch.int64, device=scores.device)


def tokens_for_share(scores: Tensor, tau: float) -> int:
    """The fewest tokens, at least 1, that hold `tau` of the layer's finite score; scores below 0 count as 0."""
    layer = scores.double().masked_fill(torch.isinf(scores), 0).clamp(min=0).sum(0)  # [S]
    held = layer.sort(descending=True).values.cumsum(0)  # [S]
    return int((held < tau * held[-1] * (1 - 1e-12)).sum().clamp(max=len(held) - 1)) + 1
