"""RazorAttention's compensation token: all that a head drops lives on as one entry, the mean, with the weight of all.

Source: Tang, Lin, Lin, Han, Ke, Hong, Yao, Wang, 2024, https://arxiv.org/abs/2407.15891, algorithm 1 and the definition of the
    compensation token.
Differs: the merging only, for any scorer; sinks, buffer and retrieval heads are other stages. The entry counts against the
    budget: the lowest of the kept tokens joins the dropped ones and gives its slot. Tokens after the prompt stay, so none
    is folded in while decoding.
Cost: one fp32 sum over the dropped tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.types import LayerKV, Merged, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class RazorCompensation:
    """Mean key and mean value of the dropped tokens, with their number on the logit; no parameters."""

    id: ClassVar[str] = "razor_compensation"
    kind: ClassVar[str] = "merge"
    title: ClassVar[str] = "RazorAttention, compensation token"
    paper: ClassVar[str] = "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2407.15891"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The merging only, for any scorer; the entry counts against the budget, in the slot of the lowest kept token, which "
        "joins the mean: exact where that token too is like all that is dropped. Tokens after the prompt are not folded in."
    )
    counts_tokens: ClassVar[bool] = True

    def merge(self, kv: LayerKV, kept: Tensor, scores: Tensor, obs: Observation) -> Merged:
        """Each head that drops something keeps one entry for it; `kept` `[Hkv, S]` bool stays as it is."""
        keys, values = kv.keys.clone(), kv.values.clone()
        counts = torch.ones(kept.shape, device=kept.device)  # [Hkv, S]
        for head, mine in enumerate(kept):
            if mine.all() or not mine.any():
                continue
            slot = lowest_kept(mine, scores[head])
            members = ~mine
            members[slot] = True
            keys[head, slot] = kv.keys[head, members].float().mean(0).to(keys.dtype)
            values[head, slot] = kv.values[head, members].float().mean(0).to(values.dtype)
            counts[head, slot] = members.sum()
        return Merged(kv=replace(kv, keys=keys, values=values), kept=kept, counts=counts)


def lowest_kept(kept: Tensor, scores: Tensor) -> int:
    """The kept token with the lowest of `scores` `[S]`; among equals the one next to the newest dropped token."""
    lowest = (kept & (scores == scores[kept].min())).nonzero()[:, 0]
    newest_dropped = (~kept).nonzero()[-1, 0]
    return int(lowest[(lowest - newest_dropped).abs().argmin()])
