"""EMS's global-local score: what the whole prompt attends to on average, or its last queries do, whichever is more.

Source: Li, Li, Meng, Ma, Geng, Xia, Wang, 2024, https://arxiv.org/abs/2412.08521; only its abstract and secondary texts could
    be read.
Differs: a reconstruction, not EMS: known is that the score joins global and local attention, not how; here each is scaled to mean
    1 and the larger one counts. The score only; budgets of heads and merging are other stages.
Cost: 2*H*w*S*D FLOPs beside the attention mass, which is gathered in the pass of the attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from steno.errors import BadArgument
from steno.kernels.attention import attention_weights
from steno.methods.checks import require_int
from steno.types import LayerKV, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class GlobalLocal:
    """The larger of mean attention over all queries and over the last ones, each scaled to mean 1.

    Parameters
    ----------
    window : int, default 32 tokens
        Last tokens of the prompt: their queries are the local ones, and they are always kept.
    kernel : int, default 7 tokens
        Width of the max pooling of the local attention; odd.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range, or `kernel` is even.
    """

    id: ClassVar[str] = "global_local"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "EMS, global-local score (reconstruction)"
    paper: ClassVar[str] = (
        "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local Importance"
    )
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2412.08521"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUERIES, Need.ATTENTION_MASS})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "A reconstruction from the abstract, not EMS: how global and local attention are joined is a guess, here the larger "
        "of the two after each is scaled to mean 1."
    )
    evicts_while_decoding: ClassVar[bool] = False

    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        require_int("window", self.window, 1)
        require_int("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise BadArgument(f"`kernel` must be odd; got kernel={self.kernel}.")

    @property
    def query_window(self) -> int:
        return self.window

    @property
    def query_statistics_skip(self) -> int:
        return 0

    @property
    def min_tokens(self) -> int:
        return self.window

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """Scores `[Hkv, S]` fp32, the window +inf."""
        heads, num_tokens = kv.num_kv_heads, kv.num_tokens
        scores = torch.full((heads, num_tokens), torch.inf, device=kv.keys.device)  # [Hkv, S]
        if num_tokens > self.window:
            assert obs.queries is not None, "the host gathers QUERIES"
            assert obs.attention_mass is not None, "the host gathers ATTENTION_MASS"
            seen_by = torch.arange(num_tokens, 0, -1, device=kv.keys.device)  # queries that may attend to each token
            over_all = obs.attention_mass.reshape(heads, -1, num_tokens).mean(1) / seen_by  # [Hkv, S]
            weights = attention_weights(obs.queries, kv.keys, scale=obs.scaling, softcap=obs.softcap)  # [H, w, S]
            local = weights.mean(1).reshape(heads, -1, num_tokens).mean(1)[:, : -self.window]  # [Hkv, S - w]
            local = max_pool1d(local[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]
            scores[:, : -self.window] = torch.maximum(_to_mean_one(over_all[:, : -self.window]), _to_mean_one(local))
        return scores


def _to_mean_one(x: Tensor) -> Tensor:
    """`x` `[Hkv, N]` >= 0 with mean 1 in each head; zeros stay."""
    return x / x.mean(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
