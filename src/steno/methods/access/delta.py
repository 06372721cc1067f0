"""DELTA: a few layers attend to everything and, by the way, find the pages that the layers after them read.

Source: Entezari Zarch, Gao, Jiang, Annavaram, 2025, https://arxiv.org/abs/2510.09883; the authors' code hoenza/DELTA.
Differs: a page holds 64 tokens, the paper's 16; the newest tokens, which are no page yet, are always read and count as the
    pages they would be. Where layers or heads hold different tokens, what one layer finds is told to others by true
    positions, and each head reads its own best pages. The layers that attend in full are those of the paper's 28-layer
    model scaled to the model's depth, unless they are named.
Cost: per layer that finds pages, the weights of all tokens, 2*H*S*D FLOPs on keys that are opened tile by tile; 4 bytes per token
    and KV head held beside the tokens where some were dropped. Saves reads, not memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.access import AccessStep, Choice
from steno.cache.ragged import best, with_ends
from steno.errors import BadArgument
from steno.methods.checks import require_int, require_text, shown
from steno.types import PAGE_TOKENS, IndexItems, Need

PAPER_LAYERS, PAPER_DEPTH = (0, 1, 2, 14, 22), 28


@final
@dataclass(frozen=True, kw_only=True)
class DELTA:
    """Read the pages in which a layer before found the most attention.

    Parameters
    ----------
    tokens : int, default 1024 tokens
        How much a step reads in the layers that do not read everything, in whole pages, at least one.
    recent : int, default 128 tokens
        The newest tokens, read in any case.
    full_layers : str or None, default None
        The layers that read everything, e.g. `"0,1,2,14,22"`, the first one among them; None: the paper's, scaled to the
        depth of the model.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    """

    id: ClassVar[str] = "delta"
    kind: ClassVar[str] = "access"
    title: ClassVar[str] = "DELTA"
    paper: ClassVar[str] = "DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2510.09883"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "A page holds 64 tokens, the paper's 16; where heads hold different tokens each reads its own best pages; the layers "
        "that read everything are the paper's, scaled to the depth of the model."
    )
    reads_all: ClassVar[bool] = False
    summarizes: ClassVar[bool] = False
    offload: ClassVar[bool] = False

    tokens: int = 1024
    recent: int = 128
    full_layers: str | None = None

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens, 1)
        require_int("recent", self.recent, 0)
        if self.full_layers is not None:
            require_text("full_layers", self.full_layers)
            parts = [part.strip() for part in self.full_layers.split(",")]
            if not all(part.isascii() and part.isdigit() and len(part) < 5 for part in parts) or 0 not in map(
                int, parts
            ):
                raise BadArgument(
                    "`full_layers` must be layer numbers with commas between, 0 among them; "
                    f"got full_layers={shown(self.full_layers)}."
                )

    def full(self, num_layers: int) -> set[int]:
        """The layers that read everything."""
        if self.full_layers is not None:
            return {int(part) for part in self.full_layers.split(",")}
        first = set(range(3))  # not scaled: they stand at the entrance of any model
        return first | {round(layer * num_layers / PAPER_DEPTH) for layer in PAPER_LAYERS[3:]}

    def reads_layer(self, layer_idx: int, num_layers: int) -> bool:
        full = self.full(num_layers)
        return layer_idx in full and (layer_idx + 1 in full or layer_idx + 1 >= num_layers)

    def fix(self, keys: Sequence[Tensor], layer_idx: int, num_layers: int) -> None:
        return None

    def summarize(self, keys: Tensor, fixed: Tensor | None, sentences: Tensor | None) -> IndexItems:
        """Nothing: `[0, 0]`."""
        return IndexItems(vectors=keys[:0, :0])

    def choose(self, step: AccessStep) -> Choice | None:
        """In a full layer everything, and its attention is noted; in others the pages that got most of it."""
        full = self.full(step.num_layers)
        if step.layer_idx in full:
            found = step.weights()
            step.share(found.segments.amax(1), found.tail.amax(1), between_heads=True)
            return None
        source = max(layer for layer in full if layer < step.layer_idx)
        in_tail = -(-step.tail_tokens // PAGE_TOKENS)  # pages, [R]
        newest = (-(-(self.recent - step.tail_tokens) // PAGE_TOKENS)).clamp(min=0)  # pages beside the tail
        scores = with_ends(step.page_sums(source), step.head_pages, last=newest)
        return Choice(pages=best(scores, torch.maximum(max(1, self.tokens // PAGE_TOKENS) - in_tail, newest)))

    def index_bytes(self, head_dim: int, number_bytes: int) -> tuple[int, int]:
        return 4, 0
