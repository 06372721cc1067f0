"""SnapKV: the last queries of the prompt already show which tokens the answer will attend to.

Source: Li, Huang, Yang, Venkitesh, Locatelli, Ye, Cai, Lewis, Chen, 2024, https://arxiv.org/abs/2404.14469, section
    4.
Differs: one choice per KV head (mean over its query heads, before pooling) instead of one per query head; the
    window's attention is averaged, not summed, which ranks the same and lets heads be compared. As in the authors'
    code, average pooling counts the zeros beyond both ends.
Cost: 2*H*w*S*D FLOPs; one fp32 temporary of G*w*S at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from steno.errors import BadArgument
from steno.kernels.attention import attention_weights
from steno.methods.checks import require_choice, require_int
from steno.types import LayerKV, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class SnapKV:
    """Pooled attention of an observation window at the end of the prompt.

    Parameters
    ----------
    window : int, default 64 tokens
        Last tokens of the prompt: their queries observe, and they are always kept.
    kernel : int, default 5 tokens
        Width of the pooling that keeps neighbours of a chosen token; odd.
    pool : str, default "avg"
        "avg" or "max".

    Raises
    ------
    BadArgument
        If a value is of another type or out of range, or `kernel` is even.
    """

    id: ClassVar[str] = "snapkv"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "SnapKV"
    paper: ClassVar[str] = "SnapKV: LLM Knows What You are Looking for Before Generation"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2404.14469"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUERIES})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "One choice per KV head (mean over its query heads, before pooling) instead of one per query head; "
        "the window's attention is averaged, not summed, which ranks the same."
    )
    evicts_while_decoding: ClassVar[bool] = False

    window: int = 64
    kernel: int = 5
    pool: str = "avg"

    def __post_init__(self) -> None:
        require_int("window", self.window, 1)
        require_int("kernel", self.kernel, 1)
        require_choice("pool", self.pool, ("avg", "max"))
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
        scores = torch.full((kv.num_kv_heads, kv.num_tokens), torch.inf, device=kv.keys.device)  # [Hkv, S]
        if kv.num_tokens > self.window:
            assert obs.queries is not None, "the host gathers QUERIES"
            weights = attention_weights(obs.queries, kv.keys, scale=obs.scaling, softcap=obs.softcap)  # [H, w, S]
            mass = weights.mean(1).reshape(kv.num_kv_heads, -1, kv.num_tokens).mean(1)  # [Hkv, S]
            scores[:, : -self.window] = self._pooled(mass[:, : -self.window])  # [Hkv, S - w]
        return scores

    def _pooled(self, mass: Tensor) -> Tensor:
        """Smooth `[Hkv, N]` along the tokens."""
        pool = avg_pool1d if self.pool == "avg" else max_pool1d
        pooled: Tensor = pool(mass[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]  # [Hkv, N]
        return pooled
