"""All: every decode step reads every page.

Source: exact attention, Vaswani et al., 2017, https://arxiv.org/abs/1706.03762.
Differs: nothing to differ from.
Cost: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from steno.cache.access import AccessStep
from steno.types import IndexItems, Need


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

    summarizes: ClassVar[bool] = False
    offload: ClassVar[bool] = False

    def reads_layer(self, layer_idx: int, num_layers: int) -> bool:
        return True

    def fix(self, keys: Sequence[Tensor], layer_idx: int, num_layers: int) -> None:
        return None

    def summarize(self, keys: Tensor, fixed: Tensor | None, sentences: Tensor | None) -> IndexItems:
        """Nothing: `[0, 0]`."""
        return IndexItems(vectors=keys[:0, :0])

    def choose(self, step: AccessStep) -> None:
        return None

    def index_bytes(self, head_dim: int, number_bytes: int) -> tuple[int, int]:
        return 0, 0
