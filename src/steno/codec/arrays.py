"""One array of a file: a matrix whose rows belong to KV heads, cut into chunks of tokens and coded plane by plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, final

import numpy as np
import torch
from torch import Tensor

from steno.codec.planes import DTYPES, join_planes, num_planes, split_planes
from steno.codec.tables import MIN_SYMBOLS, RAW, Tables
from steno.errors import DamagedFile
from steno.kernels import rans
from steno.kernels.transpose import transposed

CHUNK_TOKENS = 256
LENGTH_BYTES = 4
"""Before each stream: its bytes, uint32."""


class Choice(Protocol):
    """How the tables of a plane are chosen: `Tables.choose` or `Tables.by_spread`."""

    def __call__(self, counts: np.ndarray, *, stream_bytes: int) -> Tables: ...


@final
@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """What is to be known of a matrix `[N, columns]`, columns >= 1, to find its numbers.

    offsets: rows of head h are `offsets[h]:offsets[h + 1]`. row_tokens: tokens of a row, 1 or 64; 0: the matrix is not cut
    and lies in chunk 0. context_columns: neighbouring columns of a head that have their statistics in common.
    """

    dtype: str
    columns: int
    offsets: tuple[int, ...]
    row_tokens: int = 0
    context_columns: int = 1

    @property
    def num_rows(self) -> int:
        return self.offsets[-1]

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.columns * num_planes(self.dtype)

    @property
    def num_contexts(self) -> int:
        return (len(self.offsets) - 1) * self.contexts_per_head

    @property
    def contexts_per_head(self) -> int:
        return self.columns // self.context_columns

    @property
    def longest(self) -> int:
        """Rows of the longest head."""
        return max(b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    @cached_property
    def num_chunks(self) -> int:
        if not self.num_rows:
            return 0
        return -(-self.longest * self.row_tokens // CHUNK_TOKENS) if self.row_tokens else 1

    def slices(self, chunk: int) -> list[slice]:
        """The rows of each head in a chunk."""
        step = CHUNK_TOKENS // self.row_tokens if self.row_tokens else self.num_rows
        pairs = zip(self.offsets, self.offsets[1:], strict=False)
        return [slice(min(a + chunk * step, b), min(a + (chunk + 1) * step, b)) for a, b in pairs]


@final
@dataclass(frozen=True, kw_only=True)
class Share:
    """What of each context of a plane lies in a chunk. lengths: symbols of each, `[R]`; runs: those that tables code, in the
    order in which they are stored; uncoded ones come after them."""

    lengths: np.ndarray
    runs: rans.Runs

    @classmethod
    def of(cls, spec: ArraySpec, slices: Sequence[slice], tables: Tables) -> Share:
        per_head = [(rows.stop - rows.start) * spec.context_columns for rows in slices]
        lengths = np.repeat(np.array(per_head, np.int64), spec.contexts_per_head)
        num_tables = len(tables.frequencies)
        sums = np.bincount(tables.of_context, lengths, RAW + 1)[:num_tables]
        pairs = np.stack([sums.astype(np.int64), np.arange(num_tables)], 1)
        return cls(lengths=lengths, runs=rans.Runs.of(pairs, num_tables))


@final
class Shares:
    """The `Share` of each chunk and plane: most chunks have the same."""

    def __init__(self, spec: ArraySpec, tables: Sequence[Tables]) -> None:
        self._spec, self._tables = spec, tables
        self._known: dict[tuple[int, ...], list[Share]] = {}

    def of(self, slices: Sequence[slice]) -> list[Share]:
        """Of each plane."""
        widths = tuple(rows.stop - rows.start for rows in slices)
        if widths not in self._known:
            self._known[widths] = [Share.of(self._spec, slices, tables) for tables in self._tables]
        return self._known[widths]


@final
class ArrayEncoder:
    """A matrix that is to be stored: its planes and the tables that fit them, of `Tables.choose` or another choice."""

    def __init__(self, x: Tensor, spec: ArraySpec, choose: Choice = Tables.choose) -> None:
        self.spec = spec
        pairs = list(zip(spec.offsets, spec.offsets[1:], strict=False))
        # of each plane the contexts of each head, [contexts per head, symbols]
        self._contexts = [
            [_by_context(plane[first:last], spec.context_columns) for first, last in pairs] for plane in split_planes(x)
        ]
        if spec.num_rows * spec.columns < MIN_SYMBOLS:
            self.tables = [Tables.raw(spec.num_contexts) for _ in self._contexts]
            return
        streams = rans.STREAM_BYTES + LENGTH_BYTES
        self.tables = [
            choose(np.concatenate([rans.histograms(x) for x in heads]), stream_bytes=streams * spec.num_chunks)
            for heads in self._contexts
        ]

    def chunk(self, chunk: int) -> bytes:
        """The bytes of one chunk: of each plane the length and the stream of coded symbols, then the raw ones."""
        parts, per_head = [], self.spec.contexts_per_head
        for contexts, tables, streams in zip(self._contexts, self.tables, self._streams, strict=True):
            if len(tables.frequencies):
                parts += [len(streams[chunk]).to_bytes(LENGTH_BYTES, "little"), streams[chunk]]
            for i in np.flatnonzero(tables.of_context == RAW).tolist():
                first, last = self._ends[i // per_head, chunk : chunk + 2]
                parts.append(contexts[i // per_head][i % per_head, first:last].tobytes())
        return b"".join(parts)

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where chunks begin and end in the contexts of each head, int64 `[heads, chunks + 1]`."""
        slices = [self.spec.slices(chunk) for chunk in range(self.spec.num_chunks)]
        heads = zip(*slices, strict=True) if slices else [()] * (len(self.spec.offsets) - 1)
        rows = [[0, *(rows.stop - first for rows in of)] for of, first in zip(heads, self.spec.offsets, strict=False)]
        return np.array(rows, np.int64) * self.spec.context_columns

    @cached_property
    def _streams(self) -> list[list[bytes]]:
        """Of each plane the stream of each chunk, empty where no symbol of it is coded."""
        return [self._coded(*plane) for plane in zip(self._contexts, self.tables, strict=True)]

    def _coded(self, contexts: Sequence[np.ndarray], tables: Tables) -> list[bytes]:
        rows = tables.order[: int(np.count_nonzero(tables.of_context != RAW))]
        if not len(rows):
            return [b""] * self.spec.num_chunks
        of_strip, ends = tables.of_context[rows].astype(np.int32), self._ends[rows // self.spec.contexts_per_head]
        strips = rans.Strips(matrices=contexts, rows=rows, tables=of_strip, runs=of_strip, ends=ends)
        streams = rans.encode_strips(strips, tables.frequencies)
        has_symbols = np.diff(ends, axis=1).any(0).tolist()
        return [stream if has else b"" for stream, has in zip(streams, has_symbols, strict=True)]


@final
class ArrayDecoder:
    """A stored matrix: fed with its chunks in order, it becomes a tensor. Mutable."""

    def __init__(self, spec: ArraySpec, tables: Sequence[Tables]) -> None:
        self.spec, self.tables = spec, tables
        self._shares = Shares(spec, tables)
        self._decode_tables = [rans.decode_tables(plane.frequencies) for plane in tables]
        # of each plane the contexts of each head, [contexts per head, symbols], of heads of one length as one matrix
        per_head, width = spec.contexts_per_head, spec.context_columns
        lengths = [(b - a) * width for a, b in zip(spec.offsets, spec.offsets[1:], strict=False)]
        self._is_even = len(set(lengths)) == 1
        shapes = [(spec.num_contexts, lengths[0])] if self._is_even else [(per_head, n) for n in lengths]
        self._contexts = [[np.empty(shape, np.uint8) for shape in shapes] for _ in tables]

    def feed(self, chunk: int, data: np.ndarray, at: int) -> int:
        """Decodes this array's part of a chunk, which begins at byte `at` of data; where it ends.

        Raises `DamagedFile` if that is beyond the chunk.
        """
        slices = self.spec.slices(chunk)
        planes = zip(self._contexts, self.tables, self._decode_tables, self._shares.of(slices), strict=True)
        for contexts, tables, decode_tables, share in planes:
            stream = data[:0]
            if len(tables.frequencies):
                stream = data[at + LENGTH_BYTES :][: int.from_bytes(data[at : at + LENGTH_BYTES].tobytes(), "little")]
                at += LENGTH_BYTES + len(stream)
            num_coded = share.runs.num_symbols
            symbols = rans.decode(stream, share.runs, decode_tables) if num_coded else np.zeros(0, np.uint8)
            num_raw = int(share.lengths.sum()) - num_coded
            raw = data[at : at + num_raw]
            if len(raw) < num_raw or (len(stream) and not num_coded):
                raise DamagedFile("a chunk does not have the bytes that its arrays need.")
            at += num_raw
            if num_raw:
                symbols = np.concatenate([symbols, raw])
            self._scatter(contexts, symbols, tables.order, share, slices)
        return at

    def _scatter(
        self,
        contexts: Sequence[np.ndarray],
        symbols: np.ndarray,
        order: np.ndarray,
        share: Share,
        slices: Sequence[slice],
    ) -> None:
        """Puts the symbols of a chunk, context after context in `order`, where they belong."""
        width, per_head = self.spec.context_columns, self.spec.contexts_per_head
        starts = [(rows.start - first) * width for rows, first in zip(slices, self.spec.offsets, strict=False)]
        if self._is_even:
            columns = slice(starts[0], starts[0] + int(share.lengths[0]))
            contexts[0][order, columns] = symbols.reshape(len(order), -1)
            return
        at = 0
        for i in order.tolist():
            start, length = starts[i // per_head], int(share.lengths[i])
            contexts[i // per_head][i % per_head, start : start + length] = symbols[at : at + length]
            at += length

    def tensor(self) -> Tensor:
        """`[N, columns]`, after all chunks were fed."""
        if not self.spec.num_rows:
            return torch.empty(0, self.spec.columns, dtype=DTYPES[self.spec.dtype])
        per_head = self.spec.contexts_per_head
        planes = []
        for contexts in self._contexts:
            heads = np.split(contexts[0], range(per_head, len(contexts[0]), per_head)) if self._is_even else contexts
            rows = [_by_row(x, self.spec) for x in heads]
            planes.append(np.concatenate(rows) if len(rows) > 1 else rows[0])
        return join_planes(planes, self.spec.dtype)


def _by_row(contexts: np.ndarray, spec: ArraySpec) -> np.ndarray:
    """The inverse of `_by_context`."""
    width = spec.context_columns
    if width == 1:
        return transposed(contexts)
    rows = contexts.reshape(spec.contexts_per_head, -1, width).transpose(1, 0, 2)
    return rows.reshape(-1, spec.columns)


def _by_context(plane: np.ndarray, group: int) -> np.ndarray:
    """Rows `[n, C]` as the symbols of each context, `[C / group, n * group]`, contiguous."""
    num_rows, columns = plane.shape
    if group == 1:
        return transposed(plane)
    by_context = plane.reshape(num_rows, columns // group, group).transpose(1, 0, 2)
    return np.ascontiguousarray(by_context.reshape(columns // group, num_rows * group))
