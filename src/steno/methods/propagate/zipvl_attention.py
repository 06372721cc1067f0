"""ZipVL's prefill: in each layer only the tokens that hold most of the attention take part in it.

Source: He, Chen, Liu, Shao, Zhou, Zhang, Zhuang, 2024, https://arxiv.org/abs/2410.08584, sections 3.2 and 3.3; there is no
    code, and the probes follow the same authors' ZipCache.
Differs: the attention of the prefill only; how the cache stores tokens is left to the other stages. Reconstructions: a token
    that takes no part gets zeros from the attention and only the rest of the layer, its keys and values are kept all the
    same; 64 last and 64 random probes and tau are the paper's as remembered; the mean by which tokens are ranked is over
    the probes that see them; the last token always takes part, since it is the one that answers. The prompt has to be
    read in one pass.
Cost: 2*H*P*S*D FLOPs for P probes and fp32 temporaries of H*P*S; the attention costs the square of the share of tokens that
    take part, queries, keys, values and the MLP are computed for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.checks import require_int, require_real
from steno.types import LayerKV, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class ZipVLAttention:
    """Attention among the fewest tokens that hold a share tau of what probe queries attend to, layer by layer.

    Parameters
    ----------
    tau : float, default 0.975
        Share of the probes' attention; 1 leaves all tokens in.
    recent_probes : int, default 64 queries
        Last queries of the prompt that probe.
    random_probes : int, default 64 queries
        Queries drawn from the others.
    seed : int, default 0
        Of the draw.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    """

    id: ClassVar[str] = "zipvl_attention"
    kind: ClassVar[str] = "propagate"
    title: ClassVar[str] = "ZipVL, sparse prefill attention (reconstruction)"
    paper: ClassVar[str] = (
        "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression"
    )
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2410.08584"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "The attention of the prefill only, reconstructed from the text: tokens that take no part get zeros from it, the last "
        "one always takes part; probes and tau are the paper's as remembered."
    )
    routes_layers: ClassVar[bool] = False
    query_window: ClassVar[int] = 0

    tau: float = 0.975
    recent_probes: int = 64
    random_probes: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_real("tau", self.tau, 0, 1)
        require_int("recent_probes", self.recent_probes, 1)
        require_int("random_probes", self.random_probes, 0)
        require_int("seed", self.seed, 0)

    def within(self, kv: LayerKV, queries: Tensor, obs: Observation) -> Tensor | None:
        """The tokens `[n]` that take part, from the queries `[H, S, D]` of the whole prompt; None: all."""
        if self.tau == 1:
            return None
        probes = self.probes(kv.num_tokens, obs.layer_idx).to(queries.device)
        mass = _attention(queries[:, probes], kv.keys, probes, obs).sum((0, 1))  # [S]
        held = mass.double().sort(descending=True).values.cumsum(0)
        count = int((held < self.tau * held[-1] * (1 - 1e-12)).sum().clamp(max=len(held) - 1)) + 1
        if count == kv.num_tokens:
            return None
        seen_by = (probes[:, None] >= torch.arange(kv.num_tokens, device=probes.device)).sum(0)  # [S], 1 or more
        order = (mass / seen_by).argsort(descending=True, stable=True)  # ties go to the earlier token
        last = order.new_tensor([kv.num_tokens - 1])
        return torch.cat([order[:count], last]).unique()

    def probes(self, num_tokens: int, layer_idx: int) -> Tensor:
        """Positions of the queries that probe, ascending; drawn anew for each layer, and the same each time."""
        first = max(0, num_tokens - self.recent_probes)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer_idx)
        drawn = torch.randperm(first, generator=generator)[: self.random_probes]
        return torch.cat([drawn.sort().values, torch.arange(first, num_tokens)])


def _attention(q: Tensor, k: Tensor, where: Tensor, obs: Observation) -> Tensor:
    """Softmax attention `[H, P, S]` fp32 of queries `[H, P, D]` at positions `where` to the keys `[Hkv, S, D]` up to there."""
    grouped = q.float().reshape(k.shape[0], -1, q.shape[2])  # [Hkv, G * P, D]
    logits = torch.bmm(grouped, k.float().mT).mul_(obs.scaling).reshape(*q.shape[:2], -1)
    if obs.softcap is not None:
        logits = logits.div_(obs.softcap).tanh_().mul_(obs.softcap)
    later = torch.arange(k.shape[1], device=k.device) > where[:, None]  # [P, S]
    return logits.masked_fill_(later, -torch.inf).softmax(-1)
