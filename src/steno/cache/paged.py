"""The rows of one layer that only grow: segments plus a tail that turns into pages."""

from __future__ import annotations

import torch
from torch import Tensor

from steno.cache.access import AccessStep, Layout, SegmentIndex, Shared, index_items, read_choice
from steno.cache.groups import SpanGroup, nothing
from steno.cache.offload import offloaded
from steno.cache.policy import Selector
from steno.cache.row import Row, positions_of, unpack_kept
from steno.cache.segment import HeadKV, Segment
from steno.cache.tail import Tail
from steno.cache.tokens import NewTokens
from steno.cache.write import SegmentWriter
from steno.errors import CacheError, IntegrityError
from steno.kernels.attention import Append, SpanTable, attend, merge_attention
from steno.kernels.attention.prefill import causal_attention
from steno.types import IndexItems, Need

COUNTED_BLOCK = 512
"""New tokens that attend at a time to segments with counts."""


class PagedRows:
    """B sequences of one layer, each a `Row`, and their common `Tail`. Mutable; the segments are not.

    writer: how tokens become segments. shared: of all layers of the cache. index, state: of an access method that reads only
    a part, which chooses in `selector`; None where every step reads everything.
    """

    def __init__(
        self,
        rows: list[Row],
        tail: Tail,
        writer: SegmentWriter,
        shared: Shared,
        *,
        index: SegmentIndex | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self.rows, self.tail, self.writer, self.shared = rows, tail, writer, shared
        self.residual, self.recent = writer.policy.residual_tokens, writer.recent_tokens
        selector = writer.policy.selector
        reads_all = selector is None or selector.reads_layer(writer.layer_idx, writer.num_layers)
        self.selector = None if reads_all else selector
        self.index, self.state = index, state or {}
        self._arrange()
        if self.selector is not None and self.selector.summarizes and index is None:
            self._index_all(None)

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
        self._positions: Tensor | None = None
        found: dict[tuple[int, ...], dict[int, list[Segment]]] = {(): {b: [] for b in range(len(self.rows))}}
        for b, row in enumerate(self.rows):
            if self.selector is not None and self.selector.offload:
                row.segments = [offloaded(segment) for segment in row.segments]
            for segment in row.segments:
                if segment.spans() is None:
                    self._alone.append((b, segment))
                else:
                    found.setdefault(tuple(map(id, segment.bases)), {}).setdefault(b, []).append(segment)
        plain, *others = found.values()
        tail = (self.tail.keys, self.tail.values)
        self._groups = [SpanGroup.of(plain, self.num_kv_heads, self.tail.keys.shape[3], tail)]
        self._groups += [SpanGroup.of(rows, self.num_kv_heads) for rows in others]
        self._layout: Layout | None = None
        if self.selector is not None:
            self._layout = self._lay_out()
            self._before_tail = torch.tensor([self.seen(b) - n for b, n in enumerate(self.tail.lengths)])

    def _lay_out(self) -> Layout:
        """Where each segment of each head lies among the groups, oldest first."""
        places: dict[tuple[int, int], list[tuple[int, int]]] = {}  # of each head of each segment: group, entry
        for g, group in enumerate(self._groups):
            entry = 0
            for segments in group.segments:
                for h in range(self.num_kv_heads):
                    for segment in segments:
                        places.setdefault((id(segment), h), []).append((g, entry))
                        entry += 1
                    entry += group.table.tail is not None
        spans: list[tuple[int, int, int, int]] = []
        for b in range(len(self.rows)):
            for h in range(self.num_kv_heads):
                for segment in self.rows[b].segments:
                    # rows that were forked share segments: the first place that is left is this row's
                    g, entry = places[id(segment), h].pop(0)
                    spans.append((b * self.num_kv_heads + h, g, entry, segment.lengths[h]))
        return Layout.of(spans, len(self.rows) * self.num_kv_heads)

    def step(self, new: NewTokens) -> tuple[Tensor, Tensor]:
        """Appends new tokens and attends with their queries: out `[B, H, T, D]`, log-sum-exp `[B, H, T]`.

        An access method chooses what a single token per row reads; several read everything, and what the method keeps from
        step to step begins anew.
        """
        self.flush()
        if new.num_new > 1:
            self.state.clear()
        out, lse = self._append_and_attend(new)
        if new.num_new == 1:
            self.flush()  # tokens of a longer step may still be rolled back, so they wait for the next one
        return out, lse

    def _append_and_attend(self, new: NewTokens) -> tuple[Tensor, Tensor]:
        table = self._table_with_room(new.num_new)
        append: Append | None = (new.k, new.v, new.counts)
        is_whole = not self._alone and len(self._groups) == 1
        q = new.q if is_whole else new.q.float()  # parts are rounded once, when they are put together
        chosen: list[SpanTable | None] = [None] * len(self._groups)
        if self.selector is not None and new.num_new == 1:
            table.append(new.k, new.v, new.counts)
            self.tail.lengths, append = list(table.tail_lengths), None
            chosen = self._chosen(self.selector, new)
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
            if self.index is not None:
                self._index_new(dict(zip(rows, segments, strict=True)), count)
            for b, segment in zip(rows, segments, strict=True):
                self.rows[b].push(segment)
        self.tail.drop(counts)
        self.tail.shrink()
        self._arrange()

    def _tail_positions(self, b: int, count: int) -> list[Tensor]:
        """True positions `[count]`, per head, of the oldest tokens in the tail of a row."""
        first = [n - self.tail.lengths[b] for n in self.held_tokens()[b]]
        every = self.positions(b, self.seen(b))
        return [p[n : n + count].to(self.tail.keys.device) for p, n in zip(every, first, strict=True)]

    def seen(self, b: int) -> int:
        """The logical length of a row."""
        row, held = self.rows[b], self.held_tokens()[b][0]
        return held if row.kept is None else row.prompt_tokens + held - len(unpack_kept(row.kept)[0])

    def extend(self, new: NewTokens) -> Tensor:
        """Like `step` for many new tokens: held tokens are decoded once, row by row, and dense attention does the rest."""
        self.flush()
        if any(segment.log_counts is not None for row in self.rows for segment in row.segments):
            # dense attention knows no counts
            starts = range(0, new.num_new, COUNTED_BLOCK)
            parts = [new.part(a, min(a + COUNTED_BLOCK, new.num_new)) for a in starts]
            return torch.cat([part.with_sinks(*self._append_and_attend(part)) for part in parts], dim=2)
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
        return positions_of(self.rows[b], seen, self.num_kv_heads)

    # what a step reads

    def _chosen(self, selector: Selector, new: NewTokens) -> list[SpanTable | None]:
        """The tables of what the access method reads for one token per row, by group; the tail is always read."""
        assert self._layout is not None, "a selector has a layout"
        tail = torch.tensor(self.tail.lengths)
        choice = selector.choose(
            AccessStep(
                layer_idx=self.writer.layer_idx,
                num_layers=self.writer.num_layers,
                num_rows=len(self.rows),
                queries=new.q[:, :, 0].float().unflatten(1, (self.num_kv_heads, -1)).flatten(0, 1),  # [R, G, D]
                scale=new.scale,
                softcap=new.softcap,
                seen=(self._before_tail + tail).repeat_interleave(self.num_kv_heads),
                tail_tokens=tail.repeat_interleave(self.num_kv_heads),
                groups=self._groups,
                layout=self._layout,
                index=self.index,
                state=self.state,
                shared=self.shared,
                token_positions=self._token_positions,
            )
        )
        if choice is None:
            return [None] * len(self._groups)
        return [*read_choice(self._groups, self._layout, choice, new.q.device)]

    def _token_positions(self) -> Tensor | None:
        """True positions `[N]` of the tokens in segments, head by head; None if every row holds all it saw."""
        if all(row.kept is None for row in self.rows):
            return None
        if self._positions is None:
            per_head = [p for b in range(len(self.rows)) for p in self._segment_positions(b)]
            self._positions = torch.cat(per_head).to(self.tail.keys.device, torch.int32)
        return self._positions.long()

    def _segment_positions(self, b: int) -> list[Tensor]:
        """True positions of the tokens of each head of a row in segments."""
        lengths = self.rows[b].lengths(self.num_kv_heads)
        return [every[:n] for every, n in zip(self.positions(b, self.seen(b)), lengths, strict=True)]

    def _sentences(self, b: int, positions: list[Tensor]) -> list[Tensor] | None:
        """The sentence of the tokens at `positions` of each head, if the access method asks for it."""
        if self.selector is None or Need.TOKEN_TEXT not in self.selector.needs:
            return None
        assert self.shared.text is not None, "the layer has checked that the text was announced"
        return [self.shared.text.rows[b][p.cpu()] for p in positions]

    def _index_all(self, fixed: Tensor | None) -> None:
        """Makes the index anew. fixed: `[R, F]` if that was done before."""
        assert self.selector is not None, "only an access method has an index"
        dtype, heads, every = self.tail.keys.dtype, list[list[IndexItems]](), list[Tensor]()
        for b in range(len(self.rows)):
            if fixed is None:
                keys = [k for k, _ in self.decode_row(b, dtype)]
                made = self.selector.fix(keys, self.writer.layer_idx, self.writer.num_layers)
                every += [] if made is None else [made]
            own = every[-1] if every else None
            if fixed is not None:
                own = fixed[b * self.num_kv_heads : (b + 1) * self.num_kv_heads]
            sentences = self._sentences(b, self._segment_positions(b))
            none = self.selector.summarize(
                self.tail.keys[b, 0, :0], None if own is None else own[0], _no_tokens(sentences)
            )
            items = index_items(self.selector, self.rows[b].segments, own, sentences, dtype, self.num_kv_heads)
            heads += [[none, *pieces] for pieces in items]
        if fixed is None and every:
            fixed = torch.cat(every)
        self.index = SegmentIndex.of(heads, fixed)

    def _index_new(self, segments: dict[int, Segment], count: int) -> None:
        """Takes segments of the oldest `count` tokens in the tail into the index, one for each of some rows."""
        assert self.selector is not None, "only an access method has an index"
        assert self.index is not None, "the index was made with the rows"
        new: dict[int, list[IndexItems]] = {}
        heads = self.num_kv_heads
        for b, segment in segments.items():
            fixed = None if self.index.fixed is None else self.index.fixed[b * heads : (b + 1) * heads]
            sentences = None
            if Need.TOKEN_TEXT in self.selector.needs:
                sentences = self._sentences(b, self._tail_positions(b, count))
            items = index_items(self.selector, [segment], fixed, sentences, self.tail.keys.dtype, heads)
            new |= {b * heads + h: pieces for h, pieces in enumerate(items)}
        self.index = self.index.with_items(new)

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
        self.state.clear()
        if changed:
            self._arrange()
            if self.index is not None:
                self._index_all(self.index.fixed)

    def _crop_segments(self, row: Row, count: int) -> None:
        left = [count] * self.num_kv_heads
        while any(left):
            segment = row.segments.pop()
            keep = [max(0, n - c) for n, c in zip(segment.lengths, left, strict=True)]
            left = [max(0, c - n) for n, c in zip(segment.lengths, left, strict=True)]
            row.segments.extend(segment.prefix(keep, self.tail.keys.dtype))

    def select(self, rows: list[int], shared: Shared) -> PagedRows:
        """Copy-on-write: the given rows in that order, sharing segments and copying the tail. shared: of the cache they enter."""
        forks = [self.rows[r].fork() for r in rows]
        index = None if self.index is None else self.index.select(rows, self.num_kv_heads)
        state = {name: x[rows] for name, x in self.state.items()}
        return PagedRows(forks, self.tail.select(rows), self.writer, shared, index=index, state=state)

    def check_integrity(self, seen: list[int]) -> None:
        """Raises IntegrityError if held tokens and positions disagree."""
        for b, held in enumerate(self.held_tokens()):
            expected = [len(p) for p in self.positions(b, seen[b])]
            if held != expected:
                raise IntegrityError(f"row {b} must hold {expected} tokens per head by its positions; it holds {held}.")
            if self.tail.lengths[b] > self.tail.capacity:
                raise IntegrityError(f"row {b}: tail of {self.tail.lengths[b]} tokens in {self.tail.capacity} slots.")


def _no_tokens(sentences: list[Tensor] | None) -> Tensor | None:
    return None if sentences is None else sentences[0][:0]
