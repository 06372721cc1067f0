"""Spans of one basis: a table of their own, to which the queries come transformed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from steno.cache.segment import Segment
from steno.cache.transformed import HeadBasis, turn_outputs, turn_queries
from steno.kernels.attention import Span, SpanTable, attend


def nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q `[..., T, D]` over no token."""
    return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)


@final
@dataclass(frozen=True, kw_only=True)
class SpanGroup:
    """Segments with spans in the same bases. rows: which of the batch have any; segments: of each of these rows."""

    rows: list[int]
    segments: list[list[Segment]]
    bases: tuple[HeadBasis, ...]
    table: SpanTable

    @classmethod
    def of(
        cls,
        segments: Mapping[int, list[Segment]],
        num_kv_heads: int,
        head_dim: int | None = None,
        tail: tuple[Tensor, Tensor] | None = None,
    ) -> SpanGroup:
        """segments: by row. head_dim: of the spans, by default that of the first. tail: buffers that grow behind them."""
        spans = [[segment.spans() or [] for segment in row] for row in segments.values()]
        heads: list[list[list[Span]]] = [[[s[h] for s in row] for h in range(num_kv_heads)] for row in spans]
        first = next((segment for row in segments.values() for segment in row), None)
        width = spans[0][0][0].head_dim if head_dim is None else head_dim
        return cls(
            rows=list(segments),
            segments=list(segments.values()),
            bases=first.bases if first is not None else (),
            table=SpanTable.build(heads, head_dim=width, tail=tail),
        )

    def attend(self, q: Tensor, scale: float, softcap: float | None, pages: SpanTable | None) -> tuple[Tensor, Tensor]:
        """Attention of q `[B, H, T, D]` over this group, which has no tail; nothing for other rows.

        pages: the table to read if not all of it.
        """
        turned, table = self.turned(q), pages or self.table
        some, some_lse = attend(turned, table, scale=scale, softcap=softcap, causal=False)
        some = turn_outputs(self.bases, some, table.num_kv_heads)
        if len(self.rows) == len(q):
            return some, some_lse
        out, lse = nothing(q)
        out[self.rows], lse[self.rows] = some, some_lse
        return out, lse

    def turned(self, q: Tensor) -> Tensor:
        """The queries `[R, H, T, Dk]` of this group's rows in its basis, from those of all, `[B, H, T, D]`."""
        mine = q if len(self.rows) == q.shape[0] else q[self.rows]
        return turn_queries(self.bases, mine, self.table.num_kv_heads)
