"""Heavy hitters: the attention that each token received while the prompt was read, and its newest tokens, chosen once.

Source: the prefill half of H2O, Zhang et al., 2023, https://arxiv.org/abs/2306.14048, as LOOK-M, Wan et al., 2024,
    https://arxiv.org/abs/2406.18139, and KVMerger, Wang et al., 2024, https://arxiv.org/abs/2407.08454, score tokens.
Differs: `h2o` goes on gathering and evicting while decoding, this does not, so merging and page formats can follow. The
    gathered attention is summed over the query heads of a KV head.
Cost: the attention mass, gathered in the pass of the attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.checks import require_bool, require_real
from steno.types import LayerKV, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class HeavyHitters:
    """Accumulated attention and a recent window, at the end of the prompt.

    Parameters
    ----------
    recent_share : float, default 0.5 of the budget
        Share of the budget that the newest tokens get, rounded down; they are protected.
    normalized : bool, default False
        Whether a token's attention is averaged over the queries that see it instead of summed (ZipCache, ZipVL), so
        that early tokens have no advantage.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    """

    id: ClassVar[str] = "heavy_hitters"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "Heavy hitters, once"
    paper: ClassVar[str] = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models"
    year: ClassVar[int] = 2023
    arxiv: ClassVar[str] = "2306.14048"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ATTENTION_MASS})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The prefill half of H2O: it chooses once, at the end of the prompt; the gathered attention is summed over the query "
        "heads of a KV head."
    )
    evicts_while_decoding: ClassVar[bool] = False

    recent_share: float = 0.5
    normalized: bool = False

    def __post_init__(self) -> None:
        require_real("recent_share", self.recent_share, 0, 1)
        require_bool("normalized", self.normalized)

    @property
    def query_window(self) -> int:
        return 0

    @property
    def query_statistics_skip(self) -> int:
        return 0

    @property
    def min_tokens(self) -> int:
        return 0

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """Scores `[Hkv, S]` fp32, the newest tokens +inf."""
        assert obs.attention_mass is not None, "the host gathers ATTENTION_MASS"
        mass = obs.attention_mass.reshape(kv.num_kv_heads, -1, kv.num_tokens).sum(1)  # [Hkv, S]
        if self.normalized:
            mass = mass / torch.arange(kv.num_tokens, 0, -1, device=mass.device)
        recent = min(int(self.recent_share * obs.budget_tokens), kv.num_tokens)
        return mass.masked_fill(kv.positions >= kv.num_tokens - recent, torch.inf)
