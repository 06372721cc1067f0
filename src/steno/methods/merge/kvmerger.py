"""KVMerger: neighbours with nearly parallel keys become one entry, a Gaussian-weighted mean around the most important one.

Source: Wang, Jin, Yu, Zhang, 2024, https://arxiv.org/abs/2407.08454, sections 4.2 and 4.3; abstract and secondary texts.
Differs: written without code. The paper's threshold alone decides how many tokens are merged; here the budget does: of the
    neighbours above the threshold the most similar ones are joined until the budget holds, and where they are too few, the
    lowest sets are dropped. Importance is the score of the recipe (the paper's: accumulated attention). By default a set
    of n counts on the logit (`+log n`), which is exact for equal tokens; the paper multiplies its value by n instead,
    which is not.
Cost: one cosine per token, one sort of S; fp32 copies of the keys and values of one head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from steno.errors import BadArgument
from steno.methods.checks import require_choice, require_real
from steno.types import LayerKV, Merged, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class KVMerger:
    """Merging of runs of similar neighbours.

    Parameters
    ----------
    threshold : float, default 0.75
        Cosine above which neighbours may be merged.
    sigma : float, default 5.0
        Width of the Gaussian over the distance of keys to the most important one of a set.
    recent_share : float, default 0.34 of the budget
        Newest tokens that are never merged, as a share of what the head keeps.
    important_share : float, default 0.24 of the budget
        Tokens with the highest scores that are never merged, as a share of what the head keeps.
    size_on : str, default "logit"
        Where a set of n tokens shows its size: "logit" adds log n to its logit, "value" multiplies its value by n.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range, or `recent_share` and `important_share` are more than 1 together.
    """

    id: ClassVar[str] = "kvmerger"
    kind: ClassVar[str] = "merge"
    title: ClassVar[str] = "KVMerger (reconstruction)"
    paper: ClassVar[str] = "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2407.08454"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Written from the abstract and from reviews: sigma and the order of merging are in doubt. The budget says how many "
        "neighbours are merged, the most similar first, and drops the lowest sets where too few are above the threshold; a set "
        "counts on the logit, where the paper multiplies its value."
    )
    counts_tokens: ClassVar[bool] = True

    threshold: float = 0.75
    sigma: float = 5.0
    recent_share: float = 0.34
    important_share: float = 0.24
    size_on: str = "logit"

    def __post_init__(self) -> None:
        require_real("threshold", self.threshold, 0, 1)
        require_real("sigma", self.sigma, 1e-6, 1e6)
        require_real("recent_share", self.recent_share, 0, 1)
        require_real("important_share", self.important_share, 0, 1)
        require_choice("size_on", self.size_on, ("logit", "value"))
        if self.recent_share + self.important_share > 1:
            raise BadArgument(
                f"`recent_share` and `important_share` are shares of one budget; got "
                f"recent_share={self.recent_share}, important_share={self.important_share}."
            )

    def merge(self, kv: LayerKV, kept: Tensor, scores: Tensor, obs: Observation) -> Merged:
        """Sets in the slots of their most important tokens; each head has as many entries as `kept` `[Hkv, S]` bool."""
        keys, values, slots = kv.keys.clone(), kv.values.clone(), kept.clone()
        counts = torch.ones(kept.shape, device=kept.device)  # [Hkv, S]
        for head, mine in enumerate(kept):
            budget = int(mine.sum())
            protected = self._protected(mine, scores[head], budget)
            if mine.all() or protected.sum() >= budget:
                continue
            sets = self._sets(kv.keys[head].float(), protected, budget)  # [S]
            pivots, worth = pivots_of(sets, scores[head].masked_fill(protected, torch.inf))  # [N]
            means_k, means_v, sizes = self._merged(kv.keys[head].float(), kv.values[head].float(), sets, pivots)
            best = worth.argsort(descending=True, stable=True)[:budget]
            slot = pivots[best]
            slots[head] = False
            slots[head, slot] = True
            keys[head, slot] = means_k[best].to(keys.dtype)
            values[head, slot] = means_v[best].to(values.dtype)
            counts[head, slot] = sizes[best]
        kv = replace(kv, keys=keys, values=values)
        return Merged(kv=kv, kept=slots, counts=counts if self.size_on == "logit" else None)

    def _protected(self, kept: Tensor, scores: Tensor, budget: int) -> Tensor:
        """Which tokens `[S]` stay as they are: those of the scorer, the newest, the most important."""
        protected = kept & torch.isposinf(scores)
        protected[len(kept) - int(self.recent_share * budget) :] = True
        protected[scores.argsort(descending=True, stable=True)[: int(self.important_share * budget)]] = True
        return protected

    def _sets(self, keys: Tensor, protected: Tensor, budget: int) -> Tensor:
        """The number of each token's set `[S]`, ascending: the most similar neighbours of `keys` `[S, D]` are joined."""
        cosine = cosine_similarity(keys[1:], keys[:-1], dim=-1)  # [S - 1]
        cosine = cosine.masked_fill(protected[1:] | protected[:-1], -torch.inf)
        wanted = min(len(keys) - budget, int((cosine > self.threshold).sum()))  # each one leaves an entry less
        starts = torch.ones_like(protected)
        starts[1 + cosine.argsort(descending=True, stable=True)[:wanted]] = False
        return starts.cumsum(0) - 1

    def _merged(self, keys: Tensor, values: Tensor, sets: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values `[N, D]` of the sets and the number of their tokens `[N]`, from those of all tokens `[S, D]`."""
        distance = (keys - keys[pivots][sets]).square().sum(-1)  # [S]
        weights = torch.exp(-distance / (2 * self.sigma**2))

        def total(x: Tensor) -> Tensor:
            return x.new_zeros(len(pivots), *x.shape[1:]).index_add(0, sets, x)

        share = (weights / total(weights)[sets])[:, None]
        sizes = total(torch.ones_like(weights))
        merged = total(values * share)
        return total(keys * share), merged * sizes[:, None] if self.size_on == "value" else merged, sizes


def pivots_of(sets: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Which token of each set has the highest of `scores` `[S]`, the first of equals, and that score: `[N]` each."""
    order = scores.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    best = torch.full((int(sets[-1]) + 1,), len(order), device=order.device).scatter_reduce(0, sets, rank, "amin")
    return order[best], scores[order[best]]
