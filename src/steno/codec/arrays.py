"""One array of a file: a matrix whose rows belong to KV heads, cut into chunks of tokens and coded plane by plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

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

    @property
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
    """A matrix that is to be stored: its planes and the tables that fit them."""

    def __init__(self, x: Tensor, spec: ArraySpec) -> None:
        self.spec, self.planes = spec, split_planes(x)
        streams = rans.STREAM_BYTES + LENGTH_BYTES
        self.tables = [
            Tables.choose(self._counts(plane), stream_bytes=streams * spec.num_chunks) for plane in self.planes
        ]

    def _counts(self, plane: np.ndarray) -> np.ndarray:
        per_head, found = self.spec.contexts_per_head, []
        index = np.arange(per_head)[:, None] * rans.SYMBOLS
        for first, last in zip(self.spec.offsets, self.spec.offsets[1:], strict=False):
            symbols = _by_context(plane[first:last], self.spec.context_columns) + index
            found.append(np.bincount(symbols.reshape(-1), minlength=per_head * rans.SYMBOLS))
        return np.concatenate(found).reshape(self.spec.num_contexts, rans.SYMBOLS)

    def chunk(self, chunk: int) -> bytes:
        """The bytes of one chunk: of each plane the length and the stream of coded symbols, then the raw ones."""
        slices, parts = self.spec.slices(chunk), []
        for plane, tables in zip(self.planes, self.tables, strict=True):
            contexts = [_by_context(plane[rows], self.spec.context_columns) for rows in slices]
            if len({rows.shape for rows in contexts}) == 1:
                symbols = np.concatenate(contexts)[tables.order].reshape(-1)
            else:
                rows = [row for head in contexts for row in head]
                symbols = np.concatenate([rows[i] for i in tables.order]) if rows else np.zeros(0, np.uint8)
            runs = _runs(tables, _lengths(self.spec, slices))
            num_coded = sum(length for length, _ in runs)
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
        shape = (spec.num_rows, spec.columns)
        self._planes = [np.empty(shape, np.uint8) for _ in tables]

    def feed(self, chunk: int, data: np.ndarray, at: int) -> int:
        """Decodes this array's part of a chunk, which begins at byte `at` of data; where it ends.

        Raises `DamagedFile` if that is beyond the chunk.
        """
        slices = self.spec.slices(chunk)
        lengths = _lengths(self.spec, slices)
        for plane, tables, decode_tables in zip(self._planes, self.tables, self._decode_tables, strict=True):
            runs, stream = _runs(tables, lengths), data[:0]
            if len(tables.frequencies):
                stream = data[at + LENGTH_BYTES :][: int.from_bytes(data[at : at + LENGTH_BYTES].tobytes(), "little")]
                at += LENGTH_BYTES + len(stream)
            num_coded = sum(length for length, _ in runs)
            coded = rans.decode(stream, runs, decode_tables) if num_coded else np.zeros(0, np.uint8)
            num_raw = int(lengths.sum()) - num_coded
            raw = data[at : at + num_raw]
            if len(raw) < num_raw or (len(stream) and not num_coded):
                raise DamagedFile("a chunk does not have the bytes that its arrays need.")
            at += num_raw
            self._scatter(plane, np.concatenate([coded, raw]), tables.order, lengths, slices)
        return at

    def _scatter(
        self, plane: np.ndarray, symbols: np.ndarray, order: np.ndarray, lengths: np.ndarray, slices: Sequence[slice]
    ) -> None:
        """Puts the symbols of a chunk, context after context in `order`, where they belong."""
        group, per_head = self.spec.context_columns, self.spec.contexts_per_head
        if len(set(lengths.tolist())) == 1:
            rows = np.empty((len(order), lengths[0]), np.uint8)
            rows[order] = symbols.reshape(rows.shape)
            heads = list(rows.reshape(len(slices), per_head, lengths[0]))
        else:
            ends = np.cumsum(lengths[order])
            of_context = dict(zip(order.tolist(), np.split(symbols, ends[:-1]), strict=True))
            heads = [np.stack([of_context[h * per_head + i] for i in range(per_head)]) for h in range(len(slices))]
        for rows_of_head, where in zip(heads, slices, strict=True):
            num_rows = where.stop - where.start
            block = rows_of_head.reshape(per_head, num_rows, group).transpose(1, 0, 2)
            plane[where] = block.reshape(num_rows, self.spec.columns)

    def tensor(self) -> Tensor:
        """`[N, columns]`, after all chunks were fed."""
        if not self._planes[0].size:
            return torch.empty(self.spec.num_rows, self.spec.columns, dtype=DTYPES[self.spec.dtype])
        return join_planes(self._planes, self.spec.dtype)


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


def _runs(tables: Tables, lengths: np.ndarray) -> list[tuple[int, int]]:
    """Of each table how many symbols it codes in a chunk."""
    coded = tables.of_context != RAW
    sums = np.zeros(len(tables.frequencies), np.int64)
    np.add.at(sums, tables.of_context[coded], lengths[coded])
    return [(int(length), table) for table, length in enumerate(sums)]
