"""The span table: what the kernels read, for every row and KV head its list of spans, oldest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from enum import IntEnum, auto
from itertools import accumulate
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.kernels.quant.codebooks import BOOK, CODEBOOKS, level_table

from .spans import DENSE_DTYPES, DenseSpan, Span

if TYPE_CHECKING:
    from .plan import Plan


class Column(IntEnum):
    """Columns of the entries; the struct `Entry` of csrc/attend.h has the same order."""

    FORMAT = 0
    """0, 1, 2: dense fp32, bf16, fp16; 8, 4, 2 + 16: pages of so many bits; from 64 on: `Codebook.native_format`."""
    KEYS = auto()
    VALUES = auto()
    KEY_PARAMS = auto()
    VALUE_PARAMS = auto()
    TOKENS = auto()
    LOG_COUNTS = auto()
    PAGE_IDS = auto()
    NUM_PAGE_IDS = auto()
    """-1: the span is read whole."""
    KEY_GROUP = auto()
    VALUE_GROUP = auto()
    LEVELS = auto()
    """Address of the levels of a codebook of at most 16, or 0."""


PAGED = 16
"""Added to the bits of a page format to tell it from the dense formats."""


Append = tuple[Tensor, Tensor, list[int] | None]
"""New keys and values `[B, Hkv, T, D]` for the tails; of row b the last `counts[b]` tokens, or, with None, all."""


class SpanTable:
    """Spans of B rows with Hkv KV heads each, as Python objects and as raw addresses; keeps their tensors alive.

    rows: `rows[b][h]` is the list of spans of KV head h of row b.
    entries: `[n, len(Column)]` int64, one line per span, heads in order; offsets: `[B * Hkv + 1]` int32 into them.
    page_ids: entry → int32 page indices to read instead of the whole span.
    tail: keys and values `[B, Hkv, capacity, D]`, the buffers of the last span of every head, which still grow, or None;
    tail_lengths: how many tokens of each row count.
    has_codebooks: whether codes of some pages stand for levels of a codebook, which Triton kernels do not read.
    version: how often the entries changed. plan: what a kernel on a device has made of this table, or None.
    """

    def __init__(self, rows: list[list[list[Span]]], head_dim: int, entries: Tensor, offsets: Tensor) -> None:
        self.rows: Sequence[list[list[Span]]] = rows
        self.num_rows, self.num_kv_heads = len(rows), len(rows[0])
        self.head_dim = head_dim
        self.entries = entries
        self.offsets = offsets
        self.page_ids: Mapping[int, Tensor] = {}
        self.tail: tuple[Tensor, Tensor] | None = None
        self.tail_lengths: list[int] = []
        self.version = 0
        self.plan: Plan | None = None
        self.has_codebooks = bool((entries[:, Column.FORMAT] >= BOOK).any())
        self.tail_entries = (offsets[1:] - 1).to(torch.int64)  # [B * Hkv]
        self._tail_capacities = [_tail_capacity(row) for row in rows]

    @classmethod
    def build(
        cls, rows: list[list[list[Span]]], *, head_dim: int, tail: tuple[Tensor, Tensor] | None = None
    ) -> SpanTable:
        """The table of `rows[b][h]`, lists of spans, possibly empty; every row needs the same number of heads.

        tail: keys and values `[B, Hkv, capacity, D]` to which `append` adds tokens, read behind the spans of each head;
        none of them counts before `set_tail_lengths`.
        """
        if tail is not None:
            rows = [
                [[*spans, DenseSpan(tail[0][b, h], tail[1][b, h])] for h, spans in enumerate(row)]
                for b, row in enumerate(rows)
            ]
        if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            raise BadArgument(f"every row needs the same number of KV heads; got {[len(row) for row in rows]}.")
        heads = [spans for row in rows for spans in row]
        for span in (span for spans in heads for span in spans):
            if span.head_dim != head_dim:
                raise BadArgument(f"spans must have head_dim {head_dim}; got {span.head_dim}.")
        entries = torch.tensor([_entry(span) for spans in heads for span in spans], dtype=torch.int64)
        offsets = torch.tensor([0, *accumulate(len(spans) for spans in heads)], dtype=torch.int32)
        table = cls(rows, head_dim, entries.reshape(-1, len(Column)), offsets)
        table.tail = tail
        if tail is not None:
            table.set_tail_lengths([0] * len(rows))
        return table

    def set_tail_lengths(self, lengths: Sequence[int]) -> None:
        """Mutates the table: of the last span of every head of row b, a dense one, `lengths[b]` tokens count now."""
        if len(lengths) != self.num_rows:
            raise BadArgument(f"lengths must have one entry per row, {self.num_rows}; got {len(lengths)}.")
        for length, capacity in zip(lengths, self._tail_capacities, strict=True):
            if not 0 <= length <= capacity:
                raise BadArgument(f"a tail length must be between 0 and the dense tail's {capacity}; got {length}.")
        counts = torch.tensor(lengths, dtype=torch.int64).repeat_interleave(self.num_kv_heads)
        self.entries[:, Column.TOKENS].index_copy_(0, self.tail_entries, counts)
        self.tail_lengths = list(lengths)
        self.version += 1

    def append(self, keys: Tensor, values: Tensor, counts: list[int] | None = None) -> None:
        """Mutates the table: copies new tokens `[B, Hkv, T, D]`, of row b the last `counts[b]`, behind those in the tail."""
        lengths = self.check_append(keys, counts)
        assert self.tail is not None
        num_new = keys.shape[2]
        for buffer, new in zip(self.tail, (keys, values), strict=True):
            if counts is None and len(set(lengths)) == 1:
                buffer[:, :, lengths[0] - num_new : lengths[0]] = new
            else:
                for b, (start, end) in enumerate(zip(self.tail_lengths, lengths, strict=True)):
                    buffer[b, :, start:end] = new[b, :, num_new - (end - start) :]
        self.set_tail_lengths(lengths)

    def check_append(self, keys: Tensor, counts: list[int] | None) -> list[int]:
        """The lengths of the tails with new tokens, keys `[B, Hkv, T, D]`; raises BadArgument if they do not fit."""
        if self.tail is None:
            raise BadArgument("this table has no tail to append to; give `SpanTable.build` one.")
        rows, heads, capacity, dim = self.tail[0].shape
        if keys.ndim != 4 or keys.shape[:2] != (rows, heads) or keys.shape[3] != dim:
            raise BadArgument(f"new tokens must be [{rows}, {heads}, T, {dim}]; got {[*keys.shape]}.")
        num_new = keys.shape[2]
        added = [num_new] * rows if counts is None else counts
        if len(added) != rows or not all(0 <= n <= num_new for n in added):
            raise BadArgument(f"counts must be {rows} numbers from 0 to {num_new}; got {added}.")
        lengths = [a + b for a, b in zip(self.tail_lengths, added, strict=True)]
        if max(lengths) > capacity:
            raise BadArgument(f"the tail holds {capacity} tokens; {max(lengths)} do not fit.")
        return lengths

    def with_page_ids(self, page_ids: Mapping[int, Tensor] | Sequence[Tensor | None]) -> SpanTable:
        """A table that reads only some 64-token pages of some spans.

        Parameters
        ----------
        page_ids: entry index → int32 page indices `[m]`, each once, in any order; entries without one are read whole.
        """
        pairs = page_ids.items() if isinstance(page_ids, Mapping) else enumerate(page_ids)
        chosen = {idx: ids for idx, ids in pairs if ids is not None}
        for idx, ids in chosen.items():
            if not 0 <= idx < len(self.entries) or ids.dtype != torch.int32 or ids.ndim != 1 or not ids.is_contiguous():
                raise BadArgument(f"page ids must be int32 [m], contiguous, of an existing entry; got {ids} for {idx}.")
        table = self._copy()
        if chosen:
            lines = torch.tensor([[ids.data_ptr(), len(ids)] for ids in chosen.values()], dtype=torch.int64)
            table.entries[:, Column.PAGE_IDS : Column.NUM_PAGE_IDS + 1].index_copy_(0, torch.tensor([*chosen]), lines)
        table.page_ids = chosen
        return table

    def with_page_list(self, page_ids: Tensor, counts: Tensor) -> SpanTable:
        """`with_page_ids` for many entries at once.

        Parameters
        ----------
        page_ids: int32 `[m]`, contiguous, those of one entry behind those of the entry before.
        counts: int64 `[n]` on the CPU, how many of them are those of each entry; -1: the entry is read whole.
        """
        ends = counts.clamp(min=0).cumsum(0)
        if page_ids.dtype != torch.int32 or not page_ids.is_contiguous() or counts.shape != self.entries.shape[:1]:
            raise BadArgument(
                f"page ids must be int32, contiguous, with one count per entry, {len(self.entries)}; "
                f"got {page_ids.dtype} {[*page_ids.shape]} and {[*counts.shape]}."
            )
        if len(counts) and int(ends[-1]) != len(page_ids):
            raise BadArgument(f"the counts must add up to the {len(page_ids)} page ids; got {int(ends[-1])}.")
        table = self._copy()
        lines = [page_ids.data_ptr() + (ends - counts.clamp(min=0)) * page_ids.element_size(), counts]
        table.entries[:, Column.PAGE_IDS : Column.NUM_PAGE_IDS + 1] = torch.stack(lines, dim=1)
        table.page_ids = _PageList(page_ids, counts, ends)
        return table

    def with_tokens(self, keys: Tensor, values: Tensor, log_counts: Tensor | None, counts: Tensor) -> SpanTable:
        """A table whose heads read only some tokens, dense, and then their tail, if the table has one.

        Parameters
        ----------
        keys, values: `[m, D]`, contiguous, those of one head of one row behind those of the head before.
        log_counts: `[m]` fp32 or None. counts: int64 `[B * Hkv]` on the CPU, how many of them each head reads.
        """
        num_heads = self.num_rows * self.num_kv_heads
        if counts.shape != (num_heads,) or int(counts.sum()) != len(keys):
            raise BadArgument(f"the counts of {num_heads} heads must add up to the {len(keys)} tokens; got {counts}.")
        spans, ends = 2 if self.tail is not None else 1, counts.cumsum(0)
        table = copy(self)
        table.rows = _TokenRows(self, keys, values, log_counts, ends.tolist())
        table.entries = torch.zeros(num_heads * spans, len(Column), dtype=torch.int64)
        if self.tail is not None:
            table.entries[1::2] = self.entries[self.tail_entries]
        chosen, first = table.entries[::spans], ends - counts
        for column, x in ((Column.KEYS, keys), (Column.VALUES, values), (Column.LOG_COUNTS, log_counts)):
            if x is not None:
                chosen[:, column] = x.data_ptr() + first * x.stride(0) * x.element_size()
        chosen[:, Column.FORMAT] = DENSE_DTYPES.index(keys.dtype)
        chosen[:, Column.TOKENS] = counts
        chosen[:, Column.NUM_PAGE_IDS] = -1
        table.offsets = torch.arange(0, spans * num_heads + 1, spans, dtype=torch.int32)
        table.tail_entries = table.offsets[1:].long() - 1
        table.page_ids, table.plan, table.has_codebooks = {}, None, False
        return table

    def _copy(self) -> SpanTable:
        """The same spans with entries of their own."""
        table = copy(self)
        table.entries, table.plan = self.entries.clone(), None
        return table

    def tokens_of(self, idx: int) -> int:
        """How many tokens of the span of entry `idx` count."""
        return int(self.entries[idx, Column.TOKENS])


class _TokenRows(Sequence[list[list[Span]]]):
    """The spans of `with_tokens`, cut out when they are asked for."""

    def __init__(
        self, table: SpanTable, keys: Tensor, values: Tensor, log_counts: Tensor | None, ends: list[int]
    ) -> None:
        self.table, self.keys, self.values, self.log_counts, self.ends = table, keys, values, log_counts, [0, *ends]

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, b: int) -> list[list[Span]]: ...
    @overload
    def __getitem__(self, b: slice) -> list[list[list[Span]]]: ...
    def __getitem__(self, b: int | slice) -> list[list[Span]] | list[list[list[Span]]]:
        if isinstance(b, slice):
            return [self[i] for i in range(len(self))[b]]
        first, row = range(len(self))[b] * self.table.num_kv_heads, self.table.rows[b]
        return [[self._span(first + h), *(spans[-1:] if self.table.tail else [])] for h, spans in enumerate(row)]

    def _span(self, head: int) -> DenseSpan:
        part = slice(self.ends[head], self.ends[head + 1])
        return DenseSpan(self.keys[part], self.values[part], None if self.log_counts is None else self.log_counts[part])


class _PageList(Mapping[int, Tensor]):
    """The page ids of `with_page_list` by entry, cut out when they are asked for."""

    def __init__(self, page_ids: Tensor, counts: Tensor, ends: Tensor) -> None:
        self.page_ids, self.counts, self.ends = page_ids, counts, ends

    def __getitem__(self, idx: int) -> Tensor:
        count, end = int(self.counts[idx]), int(self.ends[idx])
        if count < 0:
            raise KeyError(idx)
        return self.page_ids[end - count : end]

    def __iter__(self) -> Iterator[int]:
        return iter((self.counts >= 0).nonzero()[:, 0].tolist())

    def __len__(self) -> int:
        return int((self.counts >= 0).sum())


def _entry(span: Span) -> list[int]:
    log_counts = 0 if span.log_counts is None else span.log_counts.data_ptr()
    if isinstance(span, DenseSpan):
        addresses = [span.keys.data_ptr(), span.values.data_ptr(), 0, 0]
        return [DENSE_DTYPES.index(span.keys.dtype), *addresses, span.num_tokens, log_counts, 0, -1, 0, 0, 0]
    pages = span.pages
    addresses = [tensor.data_ptr() for tensor in pages.tensors]
    groups = [pages.fmt.key_group, pages.fmt.value_group]
    name = pages.fmt.codebook
    native_format = PAGED + pages.fmt.bits if name is None else CODEBOOKS[name].native_format
    levels = 0 if name is None or pages.fmt.bits == 8 else level_table(name).data_ptr()
    return [native_format, *addresses, span.num_tokens, log_counts, 0, -1, *groups, levels]


def _tail_capacity(row: list[list[Span]]) -> int:
    """Tokens that the dense tails of every head of a row can hold; -1 if a head has no dense tail."""
    tails = [spans[-1] if spans else None for spans in row]
    return min(tail.num_tokens if isinstance(tail, DenseSpan) else -1 for tail in tails)
