"""LOOK-M's choice: text before images, and among each by the attention that it gathered.

Source: Wan, Wu, Liu, Huang, Zhu, Jin, Wang, Yuan, 2024, https://arxiv.org/abs/2406.18139, section 3.2.
Differs: the choice only; what becomes of the dropped tokens is left to a merge stage, as in `text_prior | look_m @ 20%`.
    As in the paper text gets the largest score on top and the budget holds, where the authors' code keeps all text, over
    the budget if need be; the gathered attention is summed over the query heads of a KV head (the code knows one query
    head per KV head); the recent tokens are a share of the budget, not of the prompt. A prompt without images is
    compressed too.
Cost: the column sums of the prompt's attention, as in h2o.
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
class TextPrior:
    """Text before images, heavy hitters first, and the newest tokens always.

    Parameters
    ----------
    recent_share : float, default 0.5 of the budget
        Share of the budget for the newest tokens, text or image, rounded down.

    Raises
    ------
    BadArgument
        If `recent_share` is not a number between 0 and 1.
    """

    id: ClassVar[str] = "text_prior"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "LOOK-M, text prior"
    paper: ClassVar[str] = "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2406.18139"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ATTENTION_MASS, Need.IMAGE_MASK})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The choice only, without the merge; the budget holds, as in the paper, where the authors' code keeps all text; "
        "the gathered attention is summed over the query heads of a KV head."
    )
    evicts_while_decoding: ClassVar[bool] = False

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        require_real("recent_share", self.recent_share, 0, 1)

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
        """Scores `[Hkv, S]` fp32: gathered attention, text above all images, the newest +inf."""
        assert obs.attention_mass is not None, "the host gathers ATTENTION_MASS"
        assert obs.image_mask is not None, "the host gathers IMAGE_MASK"
        mass = obs.attention_mass.float().reshape(kv.num_kv_heads, -1, kv.num_tokens).sum(1)  # [Hkv, S]
        above = torch.where(obs.image_mask, 0.0, float(mass.max()))  # [S]
        scores: Tensor = mass + above
        recent = int(self.recent_share * min(obs.budget_tokens, kv.num_tokens))
        scores[:, kv.num_tokens - recent :] = torch.inf
        return scores
