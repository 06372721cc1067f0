"""MoBA: a query reads the blocks whose mean key it agrees with most, and its own.

Source: Lu et al., MoBA, 2025, https://arxiv.org/abs/2502.13189; Xiao, Guo, Mazaheri, Han, Optimizing Mixture of Block
    Attention, 2025, https://arxiv.org/abs/2511.11571, and its repository mit-han-lab/flash-moba (routing).
Differs: the routing alone, on a model that was not trained with it, so expect much loss where few blocks are read; no
    convolution of keys; decode steps only, the prompt is read in full. A block is a page of 64 tokens, and blocks are
    chosen per KV head by the largest agreement of its query heads, the paper chooses per query head. The own block is the
    tail, and the page before it while the tail is empty. A model that interleaves full attention can leave first layers out.
Cost: 2*H*P*D FLOPs per step; one key per page held beside the pages. Saves reads, not memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from steno.cache.access import AccessStep, Choice
from steno.cache.ragged import best, with_ends
from steno.methods.access.pages import whole_pages
from steno.methods.checks import require_int
from steno.types import PAGE_TOKENS, IndexItems, Need


@final
@dataclass(frozen=True, kw_only=True)
class MoBA:
    """Read the blocks whose mean key has the largest product with the query.

    Parameters
    ----------
    blocks : int, default 16 blocks of 64 tokens
        How many blocks each KV head reads per step, the own one included.
    dense_layers : int, default 0 layers
        First layers that read everything.

    Raises
    ------
    BadArgument
        If a value is not a whole number or out of range.
    """

    id: ClassVar[str] = "moba"
    kind: ClassVar[str] = "access"
    title: ClassVar[str] = "MoBA routing"
    paper: ClassVar[str] = "Optimizing Mixture of Block Attention"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2511.11571"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "The routing alone, in decode steps, on a model that was not trained with it; no convolution of keys; blocks of 64 "
        "tokens are chosen per KV head by the largest agreement of its query heads."
    )
    reads_all: ClassVar[bool] = False
    summarizes: ClassVar[bool] = True
    offload: ClassVar[bool] = False

    blocks: int = 16
    dense_layers: int = 0

    def __post_init__(self) -> None:
        require_int("blocks", self.blocks, 1)
        require_int("dense_layers", self.dense_layers, 0)

    def reads_layer(self, layer_idx: int, num_layers: int) -> bool:
        return layer_idx < self.dense_layers

    def fix(self, keys: Sequence[Tensor], layer_idx: int, num_layers: int) -> None:
        return None

    def summarize(self, keys: Tensor, fixed: Tensor | None, sentences: Tensor | None) -> IndexItems:
        """The mean key of each page, `[P, D]`, pooled in fp32."""
        full = len(keys) // PAGE_TOKENS * PAGE_TOKENS
        means = whole_pages(keys).float().mean(1)  # [P, D]
        if full < len(keys):
            means[-1] = keys[full:].float().mean(0)
        return IndexItems(vectors=means.to(keys.dtype))

    def choose(self, step: AccessStep) -> Choice:
        """The own block and those with the largest products."""
        own = -(-step.tail_tokens // PAGE_TOKENS)  # [R]
        scores = with_ends(step.rank(step.queries).amax(1), step.head_pages, last=(own == 0).long())  # [R, P]
        return Choice(pages=best(scores, (self.blocks - own).clamp(min=0)))

    def index_bytes(self, head_dim: int, number_bytes: int) -> tuple[int, int]:
        page = head_dim * number_bytes
        return -(-page // PAGE_TOKENS), page
