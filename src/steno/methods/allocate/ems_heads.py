"""EMS's head-wise budgets: heads that need many tokens to hold most of their attention get more of the layer's budget.

Source: Li, Li, Meng, Ma, Geng, Xia, Wang, 2024, https://arxiv.org/abs/2412.08521; only its abstract and secondary texts could
    be read.
Differs: a reconstruction, not EMS: known is that it adapts to how sparse each head is, not how; here a head's share grows
    with the tokens that hold `mass` of its scores, over a floor. The allocation only; the global-local score and the
    merging are other stages.
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
class EMSHeads:
    """Head budgets by the number of tokens that hold most of a head's score.

    Parameters
    ----------
    mass : float, default 0.9
        Share of a head's score that its tokens are counted for.
    floor : float, default 0.2 of the budget
        Share of the budget beyond the protected tokens that every head gets; 1 is uniform.

    Raises
    ------
    BadArgument
        If a value is not a number between 0 and 1.
    """

    id: ClassVar[str] = "ems_heads"
    kind: ClassVar[str] = "allocate"
    title: ClassVar[str] = "EMS, head-wise budgets (reconstruction)"
    paper: ClassVar[str] = (
        "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local Importance"
    )
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2412.08521"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    across_layers: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    by_head: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "A reconstruction from the abstract, not EMS: the paper's rule for the budgets could not be read; here they grow "
        "with the number of tokens that hold most of a head's score."
    )

    mass: float = 0.9
    floor: float = 0.2

    def __post_init__(self) -> None:
        require_real("mass", self.mass, 0, 1)
        require_real("floor", self.floor, 0, 1)

    def allocate(self, scores: Tensor, *, budget_tokens: int, layer_idx: int, num_layers: int) -> Tensor:
        """Counts `[Hkv]` int64 from scores `[Hkv, S]`; the layer keeps exactly its budget."""
        num_heads, num_tokens = scores.shape
        protected = torch.isposinf(scores).sum(-1)  # [Hkv]
        spare = min(budget_tokens, num_tokens) * num_heads - int(protected.sum())
        if spare <= 0:
            return torch.full_like(protected, min(budget_tokens, num_tokens))
        needed = tokens_for_mass(scores, self.mass).double()  # [Hkv]
        shares = self.floor * spare / num_heads + (1 - self.floor) * spare * needed / needed.sum()
        room = (num_tokens - protected).tolist()
        return protected + torch.tensor(largest_remainder(shares.tolist(), room, spare), device=scores.device)


def tokens_for_mass(scores: Tensor, mass: float) -> Tensor:
    """The fewest tokens, at least 1, that hold `mass` of the finite score of each head `[Hkv]`; scores below 0 are lifted."""
    finite = scores.double().masked_fill(torch.isinf(scores), 0)  # [Hkv, S]
    finite = (finite - finite.amin(1, keepdim=True).clamp(max=0)).masked_fill(torch.isinf(scores), 0)
    held = finite.sort(dim=1, descending=True).values.cumsum(1)  # [Hkv, S]
    enough = held >= mass * held[:, -1:] * (1 - 1e-12)
    return enough.double().argmax(1) + 1
