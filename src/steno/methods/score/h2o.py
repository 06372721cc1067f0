"""H2O: keep the newest tokens and the heavy hitters, those that gathered the most attention so far.

Source: Zhang, Sheng, Zhou, Chen, Zheng, Cai, Song, Tian, Re, Barrett, Wang, Chen, 2023,
    https://arxiv.org/abs/2306.14048, section 4.
Differs: the gathered attention is summed over the query heads of a KV head (the authors' code knows only one query
    head per KV head); heavy and recent are shares of one budget, not of the prompt. As in the paper it is a sum, so
    early tokens, seen by more queries, are favoured.
Cost: the column sums of the prompt's attention, one multiply-add per weight in the native prefill (elsewhere a second
    pass in blocks); one sum over G per decode step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.checks import require_real
from steno.types import LayerKV, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class H2O:
    """Accumulated attention and a recent window, at every step.

    Parameters
    ----------
    heavy_share : float, default 0.5 of the budget
        Share of the budget for heavy hitters, rounded down; the newest tokens get the rest.

    Raises
    ------
    BadArgument
        If `heavy_share` is not a number between 0 and 1.
    """

    id: ClassVar[str] = "h2o"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "H2O"
    paper: ClassVar[str] = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models"
    year: ClassVar[int] = 2023
    arxiv: ClassVar[str] = "2306.14048"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ATTENTION_MASS})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The gathered attention is summed over the query heads of a KV head; "
        "heavy and recent are shares of one budget, not of the prompt."
    )
    evicts_while_decoding: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True

    heavy_share: float = 0.5

    def __post_init__(self) -> None:
        require_real("heavy_share", self.heavy_share, 0, 1)

    @property
    def query_window(self) -> int:
        return 0

    @property
    def query_statistics_skip(self) -> int:
        return 0

    @property
    def min_tokens(self) -> int:
        return 0

    def prefill_state(self, kv: LayerKV, obs: Observation) -> Tensor:
        """The attention that each token got from the whole prompt, summed over the group: `[Hkv, S]`."""
        assert obs.attention_mass is not None, "the host gathers ATTENTION_MASS"
        return _group_sum(obs.attention_mass, kv.num_kv_heads)  # [Hkv, S]

    def observe(self, state: Tensor, weights: Tensor, *, step: int) -> Tensor:
        """Add this step's weights `[H, n]`."""
        return state + _group_sum(weights, state.shape[0])  # [Hkv, n]

    def priority(self, state: Tensor, positions: Tensor, budget_tokens: int) -> Tensor:
        """The newest `budget - heavy` tokens first, then by gathered attention."""
        recent = min(budget_tokens - int(self.heavy_share * budget_tokens), positions.shape[1])
        if recent == 0:
            return state
        oldest_recent = positions.topk(recent).values[:, -1:]  # [Hkv, 1]
        return state.masked_fill(positions >= oldest_recent, torch.inf)  # [Hkv, n]

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """`priority` at the end of the prompt, `[Hkv, S]`."""
        positions = kv.positions.expand(kv.num_kv_heads, -1)  # [Hkv, S]
        return self.priority(self.prefill_state(kv, obs), positions, obs.budget_tokens)


def _group_sum(weights: Tensor, num_kv_heads: int) -> Tensor:
    """Sum `[H, n]` over the query heads of each KV head."""
    return weights.float().reshape(num_kv_heads, -1, weights.shape[-1]).sum(1)  # [Hkv, n]
