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
from steno.codec.tables import RAW, Tables
from steno.errors import DamagedFile
from steno.kernels import rans

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
class ArrayEncoder:
    """A matrix that is to be stored: its planes and the tables that fit them, of `Tables.choose` or another choice."""

    def __init__(self, x: Tensor, spec: ArraySpec, choose: Choice = Tables.choose) -> None:
        self.spec = spec
        pairs = list(zip(spec.offsets, spec.offsets[1:], strict=False))
        # of each plane the contexts of each head, [contexts per head, symbols]
        contexts = [
            [_by_context(plane[first:last], spec.context_columns) for first, last in pairs] for plane in split_planes(x)
        ]
        streams = rans.STREAM_BYTES + LENGTH_BYTES
        self.tables = [
            choose(np.concatenate([rans.histograms(x) for x in heads]), stream_bytes=streams * spec.num_chunks)
            for heads in contexts
        ]
        self._contexts = [[row for head in heads for row in head] for heads in contexts]
        # of heads of one length, a matrix in the order in which contexts are stored
        is_even = len({head.shape for head in contexts[0]}) == 1
        self._ordered = [
            np.concatenate(heads)[tables.order] if is_even else None
            for heads, tables in zip(contexts, self.tables, strict=True)
        ]

    def chunk(self, chunk: int) -> bytes:
        """The bytes of one chunk: of each plane the length and the stream of coded symbols, then the raw ones."""
        slices, parts, width = self.spec.slices(chunk), [], self.spec.context_columns
        firsts = zip(slices, self.spec.offsets, strict=False)
        columns = [slice((s.start - first) * width, (s.stop - first) * width) for s, first in firsts]
        lengths = _lengths(self.spec, slices)
        for contexts, ordered, tables in zip(self._contexts, self._ordered, self.tables, strict=True):
            if ordered is not None:
                symbols = ordered[:, columns[0]].reshape(-1)
            else:
                per_head = self.spec.contexts_per_head
                symbols = np.concatenate([contexts[i][columns[i // per_head]] for i in tables.order])
            runs = _runs(tables, lengths)
            num_coded = int(runs[:, 0].sum())
            if len(tables.frequencies):
                stream = rans.encode(symbols[:num_coded], runs, tables.frequencies) if num_coded else b""
                parts += [len(stream).to_bytes(LENGTH_BYTES, "little"), stream]
            parts.append(symbols[num_coded:].tobytes())
        return b"".join(parts)


@final
class ArrayDecoder:
    """A stored matrix: fed with its chunks in order, it becomes a tensor. Mutable."""

    def __init__(self, spec: ArraySpec, tables: Sequence[Tables]) -> None:
        self.spec, self.tables = spec, tables
        self._decode_tables = [rans.decode_tables(plane.frequencies) for plane in tables]
        # of each plane the contexts of each head, [contexts per head, symbols]
        pairs = list(zip(spec.offsets, spec.offsets[1:], strict=False))
        self._contexts = [
            [np.empty((spec.contexts_per_head, (b - a) * spec.context_columns), np.uint8) for a, b in pairs]
            for _ in tables
        ]

    def feed(self, chunk: int, data: np.ndarray, at: int) -> int:
        """Decodes this array's part of a chunk, which begins at byte `at` of data; where it ends.

        Raises `DamagedFile` if that is beyond the chunk.
        """
        slices = self.spec.slices(chunk)
        lengths = _lengths(self.spec, slices)
        for heads, tables, decode_tables in zip(self._contexts, self.tables, self._decode_tables, strict=True):
            runs, stream = _runs(tables, lengths), data[:0]
            if len(tables.frequencies):
                stream = data[at + LENGTH_BYTES :][: int.from_bytes(data[at : at + LENGTH_BYTES].tobytes(), "little")]
                at += LENGTH_BYTES + len(stream)
            num_coded = int(runs[:, 0].sum())
            coded = rans.decode(stream, runs, decode_tables) if num_coded else np.zeros(0, np.uint8)
            num_raw = int(lengths.sum()) - num_coded
            raw = data[at : at + num_raw]
            if len(raw) < num_raw or (len(stream) and not num_coded):
                raise DamagedFile("a chunk does not have the bytes that its arrays need.")
            at += num_raw
            self._scatter(heads, np.concatenate([coded, raw]), tables.order, lengths, slices)
        return at

    def _scatter(
        self,
        heads: list[np.ndarray],
        symbols: np.ndarray,
        order: np.ndarray,
        lengths: np.ndarray,
        slices: Sequence[slice],
    ) -> None:
        """Puts the symbols of a chunk, context after context in `order`, where they belong."""
        width, per_head = self.spec.context_columns, self.spec.contexts_per_head
        if len(set(lengths.tolist())) == 1:
            rows = np.empty((len(order), lengths[0]), np.uint8)
            rows[order] = symbols.reshape(rows.shape)
            found = [rows[h * per_head : (h + 1) * per_head] for h in range(len(slices))]
        else:
            ends = np.cumsum(lengths[order])
            of_context = dict(zip(order.tolist(), np.split(symbols, ends[:-1]), strict=True))
            found = [np.stack([of_context[h * per_head + i] for i in range(per_head)]) for h in range(len(slices))]
        for contexts, part, where, first in zip(heads, found, slices, self.spec.offsets, strict=False):
            contexts[:, (where.start - first) * width : (where.stop - first) * width] = part

    def tensor(self) -> Tensor:
        """`[N, columns]`, after all chunks were fed."""
        if not self.spec.num_rows:
            return torch.empty(0, self.spec.columns, dtype=DTYPES[self.spec.dtype])
        planes = [np.concatenate([_by_row(x, self.spec) for x in heads]) for heads in self._contexts]
        return join_planes(planes, self.spec.dtype)


def _by_row(contexts: np.ndarray, spec: ArraySpec) -> np.ndarray:
    """The inverse of `_by_context`."""
    width = spec.context_columns
    rows = contexts.reshape(spec.contexts_per_head, -1, width).transpose(1, 0, 2)
    return rows.reshape(-1, spec.columns)


def _by_context(plane: np.ndarray, group: int) -> np.ndarray:
    """Rows `[n, C]` as the symbols of each context, `[C / group, n * group]`."""
    num_rows, columns = plane.shape
    return (
        plane.reshape(num_rows, columns // group, group).transpose(1, 0, 2).reshape(columns // group, num_rows * group)
    )


def _lengths(spec: ArraySpec, slices: Sequence[slice]) -> np.ndarray:
    """Symbols of each context in a chunk, `[R]`."""
    per_head = [(rows.stop - rows.start) * spec.context_columns for rows in slices]
    return np.repeat(np.array(per_head, np.int64), spec.contexts_per_head)


def _runs(tables: Tables, lengths: np.ndarray) -> np.ndarray:
    """Of each table how many symbols it codes in a chunk: int64 `[K, 2]`, length and table."""
    num_tables = len(tables.frequencies)
    sums = np.bincount(tables.of_context, lengths, RAW + 1)[:num_tables]
    return np.stack([sums.astype(np.int64), np.arange(num_tables)], 1)
