"""Quest: the per-channel extremes of a page's keys bound what any of its tokens can score; read the best pages.

Source: Tang, Zhao, Zhu, Xiao, Kasikci, Han, 2024, https://arxiv.org/abs/2406.10774, section 3; the authors'
    evaluation code.
Differs: a page holds 64 tokens, the paper's 16; pages are chosen per KV head by the largest bound of its query
    heads, the paper chooses per query head.
Cost: 4*H*P*D FLOPs per step; two keys per page held beside the pages. Saves reads, not memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from steno.methods.checks import require_int
from steno.types import PAGE_TOKENS, Need


@final
@dataclass(frozen=True, kw_only=True)
class Quest:
    """Read the pages with the largest upper bounds on the logits.

    Parameters
    ----------
    tokens : int, default 1024 tokens
        How much each KV head reads per step, rounded down to pages.
    dense_layers : int, default 2 layers
        First layers that read everything.
    min_pages : int, default 3 pages
        Fewest pages that are read.

    Raises
    ------
    BadArgument
        If a value is not a whole number or out of range.
    """

    id: ClassVar[str] = "quest"
    kind: ClassVar[str] = "access"
    title: ClassVar[str] = "Quest"
    paper: ClassVar[str] = "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2406.10774"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "A page holds 64 tokens, the paper's 16; pages are chosen per KV head by the largest bound of its query heads, "
        "the paper chooses per query head."
    )
    reads_all: ClassVar[bool] = False

    tokens: int = 1024
    dense_layers: int = 2
    min_pages: int = 3

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens, 1)
        require_int("dense_layers", self.dense_layers, 0)
        require_int("min_pages", self.min_pages, 1)

    def num_pages(self, held_tokens: int) -> int:
        """Pages per KV head that a step reads when `held_tokens` are held."""
        return min(max(self.min_pages, self.tokens // PAGE_TOKENS), -(-held_tokens // PAGE_TOKENS))

    def bounds(self, queries: Tensor, key_min: Tensor, key_max: Tensor) -> Tensor:
        """Bounds `[P]` of one KV head: queries `[G, D]`, minima and maxima `[P, D]`."""
        return self.page_bounds(queries, key_min[None], key_max[None])[0]

    def page_bounds(self, queries: Tensor, key_min: Tensor, key_max: Tensor) -> Tensor:
        """Bounds `[Hkv, P]` fp32 on q.k: queries `[H, D]`, minima and maxima `[Hkv, P, D]`; max of the group."""
        grouped = queries.float().reshape(key_min.shape[0], -1, queries.shape[-1])  # [Hkv, G, D]
        upper = grouped.clamp(min=0) @ key_max.float().mT + grouped.clamp(max=0) @ key_min.float().mT  # [Hkv, G, P]
        return upper.amax(1)  # [Hkv, P]
