"""Quest: the per-channel extremes of a page's keys bound what any of its tokens can score; read the best pages.

Source: Tang, Zhao, Zhu, Xiao, Kasikci, Han, 2024, https://arxiv.org/abs/2406.10774, section 3; the authors'
    evaluation code.
Differs: a page holds 64 tokens, the paper's 16; pages are chosen per KV head by the largest bound of its query
    heads, the paper chooses per query head; the newest tokens, which are no page yet, are always read beside.
Cost: 4*H*P*D FLOPs per step; two keys per page held beside the pages. Saves reads, not memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.access import AccessStep, Choice
from steno.cache.ragged import best
from steno.methods.access.pages import whole_pages
from steno.methods.checks import require_int
from steno.types import PAGE_TOKENS, IndexItems, Need


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
        "the paper chooses per query head; the newest tokens, which are no page yet, are always read beside."
    )
    reads_all: ClassVar[bool] = False
    summarizes: ClassVar[bool] = True
    offload: ClassVar[bool] = False

    tokens: int = 1024
    dense_layers: int = 2
    min_pages: int = 3

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens, 1)
        require_int("dense_layers", self.dense_layers, 0)
        require_int("min_pages", self.min_pages, 1)

    def reads_layer(self, layer_idx: int, num_layers: int) -> bool:
        return layer_idx < self.dense_layers

    def fix(self, keys: Sequence[Tensor], layer_idx: int, num_layers: int) -> None:
        return None

    def summarize(self, keys: Tensor, fixed: Tensor | None, sentences: Tensor | None) -> IndexItems:
        """Largest and smallest key of each page side by side, `[P, 2 D]`."""
        pages = whole_pages(keys)  # [P, 64, D]
        return IndexItems(vectors=torch.cat([pages.amax(1), pages.amin(1)], dim=1))

    def choose(self, step: AccessStep) -> Choice:
        """The pages with the largest bounds on q.k of any query head."""
        q = step.queries  # [R, G, D]
        bounds = step.rank(torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=2)).amax(1)  # [R, P]
        return Choice(pages=best(bounds, step.head_pages.clamp(max=self.num_pages)))

    @property
    def num_pages(self) -> int:
        """Most pages per KV head that a step reads beside the tail."""
        return max(self.min_pages, self.tokens // PAGE_TOKENS)

    def index_bytes(self, head_dim: int, number_bytes: int) -> tuple[int, int]:
        page = 2 * head_dim * number_bytes
        return -(-page // PAGE_TOKENS), page
