"""EMS's merging: of the dropped tokens the better ones join the kept token that they resemble, the others go.

Source: Li, Li, Meng, Ma, Geng, Xia, Wang, 2024, https://arxiv.org/abs/2412.08521; only its abstract and secondary texts could
    be read.
Differs: a reconstruction, not EMS: known are evict-then-merge, a zero class that takes what cannot be merged, weights from the
    score and keys that keep their norm; how many tokens are candidates and how similar they must be is a guess. Merged once,
    at the end of the prompt, not again while decoding. The merging only; score and budgets of heads are other stages.
Cost: 2*Hkv*M*N*D FLOPs for M candidates and N centres, in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from steno.methods.checks import require_real
from steno.methods.merge.nearest import nearest_keys
from steno.types import LayerKV, Merged, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class EMS:
    """Weighted means around the kept tokens that are not protected.

    Parameters
    ----------
    gamma : float, default 1.0
        Candidates for merging as a multiple of the centres; 0 drops everything.
    tau : float, default 0.6
        Cosine above which a candidate joins its centre; the others are dropped.

    Raises
    ------
    BadArgument
        If a value is no number or out of range.
    """

    id: ClassVar[str] = "ems"
    kind: ClassVar[str] = "merge"
    title: ClassVar[str] = "EMS, merging (reconstruction)"
    paper: ClassVar[str] = (
        "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local Importance"
    )
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2412.08521"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "A reconstruction from the abstract, not EMS: how many tokens may be merged and how similar they must be is a guess; "
        "merged once, at the end of the prompt."
    )
    counts_tokens: ClassVar[bool] = False

    gamma: float = 1.0
    tau: float = 0.6

    def __post_init__(self) -> None:
        require_real("gamma", self.gamma, 0, 1e6)
        require_real("tau", self.tau, 0, 1)

    def merge(self, kv: LayerKV, kept: Tensor, scores: Tensor, obs: Observation) -> Merged:
        """The tokens of `kept` `[Hkv, S]` bool as they are or as centres; `kept` stays as it is."""
        keys, values = kv.keys.clone(), kv.values.clone()
        for head, mine in enumerate(kept):
            centres = (mine & scores[head].isfinite()).nonzero()[:, 0]  # [N]; what is protected stays as it is
            members = self._candidates(mine, scores[head], len(centres))  # [M]
            if not len(members):
                continue
            cosine, target = nearest_keys(kv.keys[head, members], kv.keys[head, centres])  # [M]
            joins = cosine > self.tau
            classes = Classes(score_weights(scores[head]), centres, members[joins], target[joins])
            merged = classes.merged()
            norms = kv.keys[head, centres].float().norm(dim=-1, keepdim=True)  # [N, 1]
            new_keys = normalize(classes.sums(kv.keys[head].float()), dim=-1) * norms  # [N, D]
            new_values = classes.means(kv.values[head].float())  # [N, D]
            keys[head, centres[merged]] = new_keys[merged].to(keys.dtype)
            values[head, centres[merged]] = new_values[merged].to(values.dtype)
        return Merged(kv=replace(kv, keys=keys, values=values), kept=kept)

    def _candidates(self, kept: Tensor, scores: Tensor, num_centres: int) -> Tensor:
        """The best dropped tokens, at most `gamma` times the centres; none without a centre."""
        order = scores.masked_fill(kept, -torch.inf).argsort(descending=True, stable=True)
        return order[: min(int(self.gamma * num_centres), int((~kept).sum()))]


@final
@dataclass(frozen=True)
class Classes:
    """Which tokens of a head are merged: weights `[S]`, centres `[N]`, members `[M]` and whose they are, `target` `[M]`."""

    weights: Tensor
    centres: Tensor
    members: Tensor
    target: Tensor

    def sums(self, x: Tensor) -> Tensor:
        """Weighted sums `[N, D]` over each class, of what every token has, `[S, D]`."""
        weighted = x * self.weights[:, None]
        return weighted[self.centres].index_add(0, self.target, weighted[self.members])

    def means(self, x: Tensor) -> Tensor:
        """Weighted means `[N, D]`."""
        return self.sums(x) / self.sums(torch.ones_like(x[:, :1]))

    def merged(self) -> Tensor:
        """Which classes `[N]` have members and a weight above 0, so that there is a mean."""
        has_members = torch.zeros_like(self.weights[self.centres]).index_add(0, self.target, self.weights[self.members])
        return has_members > 0


def score_weights(scores: Tensor) -> Tensor:
    """`scores` `[S]` as weights >= 0: lifted where some are negative; those that are infinite as the largest finite one."""
    finite = scores.isfinite()
    if not finite.any():
        return torch.ones_like(scores)
    known = scores[finite]
    return scores.clamp(known.min(), known.max()) - known.min().clamp(max=0)
