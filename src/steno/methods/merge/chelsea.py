"""Chelsea (CentroidKV): within chunks, tokens with similar keys are matched in pairs and each cluster becomes its centroid.

Source: Hu, Wang, He, Gong, Yi, Zhang, Bai, Chen, Zhang, Li, Yuan, 2025, https://arxiv.org/abs/2506.11418; abstract and
    secondary texts; the matching is that of ToMe.
Differs: written without code: the length of a chunk, the schedule of passes and `+log n` on the logits are ours. Clustered once,
    at the end of the prompt; the budget gives the number of merges, spread over the chunks in proportion. The scorer of the
    recipe only says how many tokens a head keeps and which are protected.
Cost: Hkv*S*c*D FLOPs for the first pass over chunks of c tokens, at most twice that for all passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from steno.methods.checks import require_bool, require_int
from steno.types import LayerKV, Merged, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class Chelsea:
    """Alternating bipartite matching of keys in chunks.

    Parameters
    ----------
    chunk : int, default 64 tokens
        Only tokens of one chunk are merged; longer where the budget is below one entry per chunk.
    size_bias : bool, default True
        Whether an entry of n tokens has `log n` added to its logit.

    Raises
    ------
    BadArgument
        If `chunk` is not a whole number >= 2, or `size_bias` is not True or False.
    """

    id: ClassVar[str] = "chelsea"
    kind: ClassVar[str] = "merge"
    title: ClassVar[str] = "Chelsea, CentroidKV (reconstruction)"
    paper: ClassVar[str] = "Efficient Long-Context LLM Inference via KV Cache Clustering"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2506.11418"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Written from the abstract and secondary texts: the length of a chunk, the schedule of passes and log n on the logits "
        "are ours; clustered once, at the end of the prompt, down to the budget."
    )
    counts_tokens: ClassVar[bool] = True

    chunk: int = 64
    size_bias: bool = True

    def __post_init__(self) -> None:
        require_int("chunk", self.chunk, 2)
        require_bool("size_bias", self.size_bias)

    def merge(self, kv: LayerKV, kept: Tensor, scores: Tensor, obs: Observation) -> Merged:
        """Centroids in the slots of tokens that others were matched with; each head has as many entries as `kept` `[Hkv, S]`."""
        keys, values, slots = kv.keys.clone(), kv.values.clone(), kept.clone()
        counts = torch.ones(kept.shape, device=kept.device)  # [Hkv, S]
        for head, mine in enumerate(kept):
            protected = mine & torch.isposinf(scores[head])
            free = (~protected).nonzero()[:, 0]  # [U]
            target = int(mine.sum() - protected.sum())
            if not 0 < target < len(free):
                continue
            found = Clusters.of(
                kv.keys[head, free].float(), kv.values[head, free].float(), target, self.chunk
            ).entries()
            slot = free[found.slots]
            slots[head] = protected
            slots[head, slot] = True
            keys[head, slot], values[head, slot] = found.keys.to(keys.dtype), found.values.to(values.dtype)
            counts[head, slot] = found.sizes
        kv = replace(kv, keys=keys, values=values)
        return Merged(kv=kv, kept=slots, counts=counts if self.size_bias else None)


@final
@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Clusters of one head in N chunks of at most W entries; what lies beyond a chunk's length means nothing.

    keys, values: `[N, W, D]` fp32, the centroids; sizes: `[N, W]` fp32, tokens of each; slots: `[N, W]` int64, the token in
    whose place it stands; lengths: `[N]` int64.
    """

    keys: Tensor
    values: Tensor
    sizes: Tensor
    slots: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, target: int, chunk: int) -> Clusters:
        """Exactly `target` clusters, 1 to U, of keys and values `[U, D]` fp32."""
        num_tokens = len(keys)
        chunk = max(chunk, -(-num_tokens // target))  # a chunk keeps one entry at least
        num_chunks = -(-num_tokens // chunk)
        ends = (torch.arange(num_chunks + 1, device=keys.device) * chunk).clamp(max=num_tokens)
        goal = (ends * target // num_tokens).diff()  # [N], in proportion
        slots = (
            torch.arange(num_chunks * chunk, device=keys.device).clamp(max=num_tokens - 1).reshape(num_chunks, chunk)
        )
        found = cls(
            keys=keys[slots],
            values=values[slots],
            sizes=torch.ones(slots.shape, device=keys.device),
            slots=slots,
            lengths=ends.diff(),
        )
        while (found.lengths > goal).any():
            found = found.matched(torch.minimum(found.lengths // 2, found.lengths - goal))
        return found

    def matched(self, merges: Tensor) -> Clusters:
        """One pass: of the entries at even places the `merges` `[N]` most similar ones join their partner at an odd place."""
        is_there = torch.arange(self.slots.shape[1], device=merges.device) < self.lengths[:, None]  # [N, W]
        directions = normalize(self.keys, dim=-1)
        cosine = directions[:, 0::2] @ directions[:, 1::2].mT  # [N, A, B]
        cosine = cosine.masked_fill(~is_there[:, None, 1::2], -torch.inf)
        best, partner = cosine.max(dim=2)  # [N, A]
        order = best.masked_fill(~is_there[:, 0::2], -torch.inf).argsort(dim=1, descending=True, stable=True)
        joins = torch.zeros_like(order, dtype=torch.bool)
        joins.scatter_(1, order, torch.arange(order.shape[1], device=order.device) < merges[:, None])  # [N, A]

        def gathered(x: Tensor) -> Tensor:
            """Sums `[N, W, _]` after the even ones that join were added to their partners."""
            total = x.clone()
            moved = x[:, 0::2] * joins[:, :, None]
            total[:, 1::2] = total[:, 1::2].scatter_add(1, partner[:, :, None].expand_as(moved), moved)
            return total

        sizes = gathered(self.sizes[:, :, None])  # [N, W, 1]
        keys, values = (gathered(x * self.sizes[:, :, None]) / sizes for x in (self.keys, self.values))
        stays = is_there.clone()
        stays[:, 0::2] &= ~joins
        lengths = self.lengths - merges
        place = (~stays).int().argsort(dim=1, stable=True)[:, : int(lengths.max())]  # [N, W'], those that stay first
        wide = place[:, :, None].expand(-1, -1, keys.shape[2])
        return Clusters(
            keys=keys.gather(1, wide),
            values=values.gather(1, wide),
            sizes=sizes[:, :, 0].gather(1, place),
            slots=self.slots.gather(1, place),
            lengths=lengths,
        )

    def entries(self) -> Clusters:
        """All clusters in one chunk, without what means nothing: `[n, D]`, `[n]`, `[n]`."""
        is_there = torch.arange(self.slots.shape[1], device=self.lengths.device) < self.lengths[:, None]
        return Clusters(
            keys=self.keys[is_there],
            values=self.values[is_there],
            sizes=self.sizes[is_there],
            slots=self.slots[is_there],
            lengths=self.lengths.sum()[None],
        )
