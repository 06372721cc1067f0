"""All: every decode step reads every page.

Source: exact attention, Vaswani et al., 2017, https://arxiv.org/abs/1706.03762.
Differs: nothing to differ from.
Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from steno.types import PAGE_TOKENS, Need


@final
@dataclass(frozen=True, kw_only=True)
class All:
    """Read everything; no parameters. The default."""

    id: ClassVar[str] = "all"
    kind: ClassVar[str] = "access"
    title: ClassVar[str] = "All pages"
    paper: ClassVar[str] = "Attention Is All You Need"
    year: ClassVar[int] = 2017
    arxiv: ClassVar[str] = "1706.03762"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = False
    differs: ClassVar[str] = "Nothing to differ from."
    reads_all: ClassVar[bool] = True

    @property
    def dense_layers(self) -> int:
        return 0

    def num_pages(self, held_tokens: int) -> int:
        """All pages that `held_tokens` fill, the last one begun."""
        return -(-held_tokens // PAGE_TOKENS)

    def page_bounds(self, queries: Tensor, key_min: Tensor, key_max: Tensor) -> Tensor:
        """Zeros `[Hkv, P]`: no page is better than another."""
        return key_min.new_zeros(key_min.shape[:2]).float()
