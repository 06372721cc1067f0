"""The rows of one layer that only grow: segments plus a tail that turns into pages."""

from __future__ import annotations

import torch
from torch import Tensor

from steno.cache.groups import SpanGroup, nothing, select_pages
from steno.cache.policy import PageSelector
from steno.cache.row import Row, unpack_kept
from steno.cache.segment import HeadKV, Segment
from steno.cache.tail import Tail
from steno.cache.tokens import NewTokens
from steno.cache.write import SegmentWriter
from steno.errors import CacheError, IntegrityError
from steno.kernels.attention import Append, SpanTable, attend, merge_attention
from steno.kernels.attention.prefill import causal_attention

COUNTED_BLOCK = 512
"""New tokens that attend at a time to segments with counts."""


class PagedRows:
    """B sequences of one layer, each a `Row`, and their common `Tail`. Mutable; the segments are not.

    writer: how tokens become segments.
    """

    def __init__(self, rows: list[Row], tail: Tail, writer: SegmentWriter) -> None:
        self.rows, self.tail, self.writer = rows, tail, writer
        self.residual, self.recent = writer.policy.residual_tokens, writer.recent_tokens
        self._arrange()

    @property
    def num_kv_heads(self) -> int:
        return self.tail.keys.shape[1]

    def held_tokens(self) -> list[list[int]]:
        """Held tokens `[B][Hkv]`."""
        heads = self.num_kv_heads
        return [[n + t for n in row.lengths(heads)] for row, t in zip(self.rows, self.tail.lengths, strict=True)]

    def table(self) -> SpanTable:
        """The plain spans of every row and head, the tail last. Built anew only when segments or buffers changed."""
        table = self._groups[0].table
        if table.tail_lengths != self.tail.lengths:
            table.set_tail_lengths(self.tail.lengths)
        return table

    def _arrange(self) -> None:
        """Puts the segments into groups of one basis, the plain one first, and aside those that attend by themselves."""
        self._alone: list[tuple[int, Segment]] = []
        found: dict[tuple[int, ...], dict[int, list[Segment]]] = {(): {b: [] for b in range(len(self.rows))}}
        for b, row in enumerate(self.rows):
            for segment in row.segments:
                if segment.spans() is None:
                    self._alone.append((b, segment))
                else:
                    found.setdefault(tuple(map(id, segment.bases)), {}).setdefault(b, []).append(segment)
        plain, *others = found.values()
        tail = (self.tail.keys, self.tail.values)
        self._groups = [SpanGroup.of(plain, self.num_kv_heads, self.tail.keys.shape[3], tail)]
        self._groups += [SpanGroup.of(rows, self.num_kv_heads) for rows in others]

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
        is_whole = not self._alone and len(self._groups) == 1
        q = new.q if is_whole else new.q.float()  # parts are rounded once, when they are put together
        chosen: list[SpanTable | None] = [None] * len(self._groups)
        if selector is not None and new.num_new == 1:
            table.append(new.k, new.v, new.counts)
            self.tail.lengths, append = list(table.tail_lengths), None
            chosen = [*select_pages(self._groups, q, selector)]
        out, lse = attend(q, chosen[0] or table, append=append, scale=new.scale, softcap=new.softcap)
        self.tail.lengths = list(table.tail_lengths)
        if is_whole:
            return out, lse
        parts = [(out, lse)]
        for group, pages in zip(self._groups[1:], chosen[1:], strict=True):
            parts.append(group.attend(q, new.scale, new.softcap, pages))
        parts += self._attend_alone(q, new)
        out, lse = merge_attention([part for part, _ in parts], [part for _, part in parts])
        return out.to(new.q.dtype), lse

    def _attend_alone(self, q: Tensor, new: NewTokens) -> list[tuple[Tensor, Tensor]]:
        """Attention over the segments that attend by themselves: so many parts of the batch as a row has of them."""
        parts: list[tuple[Tensor, Tensor]] = []
        taken = [0] * len(self.rows)
        for b, segment in self._alone:
            if taken[b] == len(parts):
                parts.append(nothing(q))
            out, lse = parts[taken[b]]
            out[b], lse[b] = segment.attend(q[b], new.scale, new.softcap)
            taken[b] += 1
        return parts

    def _table_with_room(self, num_new: int) -> SpanTable:
        if self.tail.reserve(num_new):
            self._arrange()
        return self.table()

    def flush(self) -> None:
        """Turns full residuals of the tail into segments, those of all rows at once."""
        if max(self.tail.lengths) < self.residual + self.recent:
            return
        counts = [max(0, n - self.recent) // self.residual * self.residual for n in self.tail.lengths]
        for count in {*counts} - {0}:
            rows = [b for b, n in enumerate(counts) if n == count]
            positions = [self._tail_positions(b, count) for b in rows] if self.writer.needs_positions else []
            bases = [self.rows[b].bases for b in rows]
            segments = self.writer.write_tail(*self.tail.oldest(rows, count), positions, bases)
            for b, segment in zip(rows, segments, strict=True):
                self.rows[b].push(segment)
        self.tail.drop(counts)
        self.tail.shrink()
        self._arrange()

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
        table = self._table_with_room(new.num_new)
        table.append(new.k, new.v, new.counts)
        self.tail.lengths = list(table.tail_lengths)
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
            self._arrange()

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
