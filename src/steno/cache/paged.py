"""The rows of one layer that only grow: segments plus a tail that turns into pages."""

from __future__ import annotations

import torch
from torch import Tensor

from steno.cache.policy import PageSelector
from steno.cache.row import Row, unpack_kept
from steno.cache.segment import HeadKV, Segment
from steno.cache.tail import Tail
from steno.cache.tokens import NewTokens
from steno.cache.write import SegmentWriter
from steno.errors import CacheError, IntegrityError
from steno.kernels.attention import Append, Span, SpanTable, attend, merge_attention
from steno.kernels.attention.prefill import causal_attention
from steno.types import PAGE_TOKENS

COUNTED_BLOCK = 512
"""New tokens that attend at a time to segments with counts."""


class PagedRows:
    """B sequences of one layer, each a `Row`, and their common `Tail`. Mutable; the segments are not.

    writer: how tokens become segments.
    """

    def __init__(self, rows: list[Row], tail: Tail, writer: SegmentWriter) -> None:
        self.rows, self.tail, self.writer = rows, tail, writer
        self.residual = writer.policy.residual_tokens
        self._table = self._build_table()

    @property
    def num_kv_heads(self) -> int:
        return self.tail.keys.shape[1]

    def held_tokens(self) -> list[list[int]]:
        """Held tokens `[B][Hkv]`."""
        heads = self.num_kv_heads
        return [[n + t for n in row.lengths(heads)] for row, t in zip(self.rows, self.tail.lengths, strict=True)]

    def table(self) -> SpanTable:
        """The spans of every row and head, the tail last. Built anew only when segments or buffers changed."""
        if self._table.tail_lengths != self.tail.lengths:
            self._table.set_tail_lengths(self.tail.lengths)
        return self._table

    def _build_table(self) -> SpanTable:
        rows: list[list[list[Span]]] = []
        self._alone: list[tuple[int, Segment]] = []
        for b, row in enumerate(self.rows):
            heads: list[list[Span]] = [[] for _ in range(self.num_kv_heads)]
            for segment in row.segments:
                spans = segment.spans()
                if spans is None:
                    self._alone.append((b, segment))
                    continue
                for head, span in zip(heads, spans, strict=True):
                    head.append(span)
            rows.append(heads)
        return SpanTable.build(rows, head_dim=self.tail.keys.shape[3], tail=(self.tail.keys, self.tail.values))

    def step(self, new: NewTokens, selector: PageSelector | None = None) -> tuple[Tensor, Tensor]:
        """Appends new tokens and attends with their queries: out `[B, H, T, D]`, log-sum-exp `[B, H, T]`."""
        self.flush()
        out, lse = self._append_and_attend(new, selector)
        if new.num_new == 1:
            self.flush()  # tokens of a longer step may still be rolled back, so they wait for the next one
        return out, lse

    def _append_and_attend(self, new: NewTokens, selector: PageSelector | None) -> tuple[Tensor, Tensor]:
        table = self._table_with_room(new.num_new)
        append: Append | None = (new.k, new.v, new.counts)
        q = new.q.float() if self._alone else new.q  # parts are rounded once, when they are put together
        if selector is not None and new.num_new == 1:
            table.append(new.k, new.v, new.counts)
            self.tail.lengths, append = list(table.tail_lengths), None
            table = self._select_pages(table, new.q, selector)
        out, lse = attend(q, table, append=append, scale=new.scale, softcap=new.softcap)
        self.tail.lengths = list(table.tail_lengths)
        if self._alone:
            out, lse = self._with_those_alone(q, out, lse, new)
        return out.to(new.q.dtype), lse

    def _with_those_alone(self, q: Tensor, out: Tensor, lse: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
        """Adds the segments that attend by themselves to the attention over all others, row by row."""
        outs, lses = out.clone(), lse.clone()
        for b in {b for b, _ in self._alone}:
            parts = [segment.attend(q[b], new.scale, new.softcap) for row, segment in self._alone if row == b]
            every = [(out[b], lse[b]), *parts]
            outs[b], lses[b] = merge_attention([part for part, _ in every], [part for _, part in every])
        return outs, lses

    def _table_with_room(self, num_new: int) -> SpanTable:
        if self.tail.reserve(num_new):
            self._table = self._build_table()
        return self.table()

    def flush(self) -> None:
        """Turns full residuals of the tail into segments, those of all rows at once."""
        if max(self.tail.lengths) < self.residual:
            return
        counts = [n // self.residual * self.residual for n in self.tail.lengths]
        for count in {*counts} - {0}:
            rows = [b for b, n in enumerate(counts) if n == count]
            positions = [self._tail_positions(b, count) for b in rows] if self.writer.needs_positions else None
            segments = self.writer.write_tail(*self.tail.oldest(rows, count), positions)
            for b, segment in zip(rows, segments, strict=True):
                self.rows[b].push(segment)
        self.tail.drop(counts)
        self.tail.shrink()
        self._table = self._build_table()

    def _tail_positions(self, b: int, count: int) -> list[Tensor]:
        """True positions `[count]`, per head, of the oldest tokens in the tail of a row."""
        row, held = self.rows[b], self.held_tokens()[b]
        kept = held if row.kept is None else [len(index) for index in unpack_kept(row.kept)]
        seen = held[0] if row.kept is None else row.prompt_tokens + held[0] - kept[0]
        first = [n - self.tail.lengths[b] for n in held]
        return [p[n : n + count].to(self.tail.keys.device) for p, n in zip(self.positions(b, seen), first, strict=True)]

    def extend(self, new: NewTokens) -> Tensor:
        """Like `step` for many new tokens: held tokens are decoded once, row by row, and dense attention does the rest."""
        self.flush()
        if any(segment.log_counts is not None for row in self.rows for segment in row.segments):
            # dense attention knows no counts
            starts = range(0, new.num_new, COUNTED_BLOCK)
            parts = [new.part(a, min(a + COUNTED_BLOCK, new.num_new)) for a in starts]
            return torch.cat([part.with_sinks(*self._append_and_attend(part, None)) for part in parts], dim=2)
        out = torch.zeros_like(new.q)
        for b, count in enumerate(new.row_counts):
            if count:
                new.scatter_(out, b, self._extend_row(b, new.row(b)))
        self._table_with_room(new.num_new).append(new.k, new.v, new.counts)
        self.tail.lengths = list(self._table.tail_lengths)
        return out

    def _extend_row(self, b: int, new: NewTokens) -> Tensor:
        group = new.q.shape[1] // self.num_kv_heads
        outs = []
        for h, (held_k, held_v) in enumerate(self.decode_row(b, new.q.dtype)):  # heads may differ in length
            heads = slice(h * group, (h + 1) * group)
            k, v = torch.cat([held_k, new.k[0, h]]), torch.cat([held_v, new.v[0, h]])  # [S, D]
            sinks = None if new.sinks is None else new.sinks[heads]
            q = new.q[:, heads]  # [1, G, T, D]
            outs.append(
                causal_attention(q, k[None, None], v[None, None], scale=new.scale, softcap=new.softcap, sinks=sinks)
            )
        return torch.cat(outs, dim=1)

    def decode_row(self, b: int, dtype: torch.dtype) -> list[HeadKV]:
        """Dense keys and values `[n_h, D]` of every head of a row, tail included."""
        tail_keys, tail_values = self.tail.row(b)
        parts = [segment.decode(dtype) for segment in self.rows[b].segments]
        return [
            (
                torch.cat([part[h][0] for part in parts] + [tail_keys[h].to(dtype)]),
                torch.cat([part[h][1] for part in parts] + [tail_values[h].to(dtype)]),
            )
            for h in range(self.num_kv_heads)
        ]

    def positions(self, b: int, seen: int) -> list[Tensor]:
        """True positions of the held tokens of each head of a row that has seen `seen` tokens."""
        row = self.rows[b]
        if row.kept is None:
            return [torch.arange(seen)] * self.num_kv_heads
        after = torch.arange(row.prompt_tokens, seen)
        return [torch.cat([index, after]) for index in unpack_kept(row.kept)]

    def _select_pages(self, table: SpanTable, q: Tensor, selector: PageSelector) -> SpanTable:
        """Reads only the pages whose bound is highest for this query; the tail is always read."""
        group = q.shape[1] // self.num_kv_heads
        page_ids: dict[int, Tensor] = {}
        span = 0
        for b, row in enumerate(self.rows):
            segments = [segment for segment in row.segments if segment.spans() is not None]
            bounds = [segment.summaries for segment in segments]
            for h in range(self.num_kv_heads):
                heads = [s[h] for s in bounds if s is not None]
                if heads:
                    low, high = (torch.cat([pair[i] for pair in heads]) for i in (0, 1))
                    wanted = min(selector.num_pages(low.shape[0] * PAGE_TOKENS), low.shape[0])
                    queries = q[b, h * group : (h + 1) * group, 0]  # [G, D]
                    scores = selector.page_bounds(queries, low[None], high[None])[0]
                    best = torch.topk(scores, wanted).indices.sort().values
                    first = 0
                    for i, (head_low, _) in enumerate(heads):
                        last = first + head_low.shape[0]
                        page_ids[span + i] = (best[(best >= first) & (best < last)] - first).to(torch.int32)
                        first = last
                span += len(segments) + 1
        return table.with_page_ids(page_ids)

    def check_crop(self, count: int, seen: list[int]) -> None:
        """Raises CacheError if a compressed prompt stands in the way; `seen`: the logical lengths before."""
        for row, n in zip(self.rows, seen, strict=True):
            if row.kept is not None and n - count < row.prompt_tokens:
                raise CacheError(
                    f"crop must leave the compressed prompt of {row.prompt_tokens} tokens whole, since tokens that were "
                    f"dropped cannot come back; got {n} - {count}. Read the prompt again."
                )

    def crop(self, count: int, seen: list[int]) -> None:
        """Removes the newest `count` tokens of every row; the owner has called `check_crop`."""
        changed = False
        for b, row in enumerate(self.rows):
            missing = count - self.tail.lengths[b]
            self.tail.lengths[b] = max(0, -missing)
            if missing > 0:
                self._crop_segments(row, missing)
                changed = True
        if changed:
            self._table = self._build_table()

    def _crop_segments(self, row: Row, count: int) -> None:
        left = [count] * self.num_kv_heads
        while any(left):
            segment = row.segments.pop()
            keep = [max(0, n - c) for n, c in zip(segment.lengths, left, strict=True)]
            left = [max(0, c - n) for n, c in zip(segment.lengths, left, strict=True)]
            row.segments.extend(segment.prefix(keep, self.tail.keys.dtype))

    def select(self, rows: list[int]) -> PagedRows:
        """Copy-on-write: the given rows in that order, sharing segments and copying the tail."""
        forks = [self.rows[r].fork() for r in rows]
        return PagedRows(forks, self.tail.select(rows), self.writer)

    def check_integrity(self, seen: list[int]) -> None:
        """Raises IntegrityError if held tokens and positions disagree."""
        for b, held in enumerate(self.held_tokens()):
            expected = [len(p) for p in self.positions(b, seen[b])]
            if held != expected:
                raise IntegrityError(f"row {b} must hold {expected} tokens per head by its positions; it holds {held}.")
            if self.tail.lengths[b] > self.tail.capacity:
                raise IntegrityError(f"row {b}: tail of {self.tail.lengths[b]} tokens in {self.tail.capacity} slots.")
