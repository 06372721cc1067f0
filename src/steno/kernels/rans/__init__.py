"""Entropy coding of bytes: interleaved rANS with static tables (csrc/rans.cpp, which says where it comes from).

A table gives each of 256 symbols a frequency; those of a table add up to 4096. Symbols come in runs of one table each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from steno.errors import BadArgument, DamagedFile, nearest
from steno.kernels import native

from . import naive
from .naive import SLOTS, STATES

SYMBOLS = 256
IMPLS = ("auto", "cpu", "naive")


@final
@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs that were checked: how many symbols, int64 `[n]`, and which of `num_tables` tables codes them, int32 `[n]`."""

    lengths: np.ndarray
    tables: np.ndarray
    num_tables: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]] | np.ndarray, num_tables: int) -> Runs:
        """Of pairs of a length and a table, or int64 `[n, 2]`; raises `BadArgument` for runs that there cannot be."""
        found = np.asarray(pairs, np.int64).reshape(-1, 2)
        wrong = (found[:, 0] < 0) | (found[:, 1] < 0) | (found[:, 1] >= num_tables)
        if wrong.any():
            length, table = found[wrong][0].tolist()
            raise BadArgument(f"a run needs a length >= 0 and one of {num_tables} tables; got {length}, {table}.")
        return cls(
            lengths=np.ascontiguousarray(found[:, 0]), tables=found[:, 1].astype(np.int32), num_tables=num_tables
        )

    @cached_property
    def num_symbols(self) -> int:
        return int(self.lengths.sum())

    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.lengths.tolist(), self.tables.tolist(), strict=True))


AnyRuns = Runs | Sequence[tuple[int, int]] | np.ndarray
"""`Runs`, or what `Runs.of` takes."""

STREAM_BYTES = 4 * STATES
"""Bytes of a stream beside its words."""


def normalize(counts: np.ndarray) -> np.ndarray:
    """Frequencies `[K, S]` uint16 that add up to 4096 in each table, nearly in proportion to counts `[K, S]` of S symbols.

    Every symbol that occurs has at least 1; a table of no symbol at all gives everything to symbol 0.
    """
    counts = np.asarray(counts, np.float64)
    totals = counts.sum(1, keepdims=True)
    counts = np.where(totals > 0, counts, np.eye(1, counts.shape[1]))
    scaled = counts * (SLOTS / counts.sum(1, keepdims=True))  # [K, 256]
    frequencies = np.maximum(np.floor(scaled), counts > 0)
    left = SLOTS - frequencies.sum(1).astype(np.int64)
    order = np.argsort(frequencies - scaled, axis=1, kind="stable")  # who has the least of its share gets more first
    ranks = np.argsort(order, axis=1, kind="stable")
    frequencies += ranks < left[:, None]
    for i in np.flatnonzero(left < 0):  # rare symbols took more than their share; the others give where it costs least
        row, count, missing = frequencies[i], counts[i], -left[i]
        while missing > 0:
            cost = np.where(row > 1, count * np.log(np.maximum(row, 2) / np.maximum(row - 1, 1)), np.inf)
            givers = np.argsort(cost, kind="stable")[: min(missing, int((row > 1).sum()))]
            row[givers] -= 1
            missing -= len(givers)
    return frequencies.astype(np.uint16)


def histograms(rows: np.ndarray) -> np.ndarray:
    """How often each of 256 symbols occurs in each row: int64 `[R, 256]` of symbols `[R, n]` uint8."""
    if rows.dtype != np.uint8 or rows.ndim != 2:
        raise BadArgument(f"symbols must be uint8 [R, n]; got {rows.dtype} {[*rows.shape]}.")
    if native.why_missing() is not None:
        return (
            np.stack([np.bincount(row, minlength=SYMBOLS) for row in rows])
            if len(rows)
            else np.zeros((0, SYMBOLS), int)
        )
    rows = np.ascontiguousarray(rows)
    counts = np.zeros((len(rows), SYMBOLS), np.int64)
    native.library().steno_rans_histograms(
        native.address(rows), ctypes.c_int64(len(rows)), ctypes.c_int64(rows.shape[1]), native.address(counts)
    )
    return counts


def decode_tables(frequencies: np.ndarray) -> np.ndarray:
    """What `decode` reads: uint32 `[K, 4096]` of frequencies `[K, 256]`, 16 KiB each.

    An entry: the symbol, 12 bits of its frequency less one, 12 bits of the slot's place in it. Raises `BadArgument` unless
    the frequencies of each table add up to 4096.
    """
    _check_frequencies(frequencies)
    if native.why_missing() is None:
        frequencies, tables = np.ascontiguousarray(frequencies), np.empty((len(frequencies), SLOTS), np.uint32)
        native.library().steno_rans_tables(
            native.address(frequencies), ctypes.c_int64(len(frequencies)), native.address(tables)
        )
        return tables
    return naive_tables(frequencies)


def naive_tables(frequencies: np.ndarray) -> np.ndarray:
    """`decode_tables` in numpy."""
    wide = frequencies.astype(np.uint32)
    symbols = np.tile(np.arange(SYMBOLS, dtype=np.uint32), len(wide))
    starts = (np.cumsum(wide, axis=1, dtype=np.uint32) - wide).reshape(-1)
    flat = wide.reshape(-1)
    slots = np.tile(np.arange(SLOTS, dtype=np.uint32), len(wide))
    entries = np.repeat(symbols | (flat - np.minimum(flat, 1)) << 8, flat) | (slots - np.repeat(starts, flat)) << 20
    return entries.reshape(len(wide), SLOTS)


def encode(
    symbols: np.ndarray,
    runs: AnyRuns,
    frequencies: np.ndarray,
    *,
    impl: str = "auto",
    isa: str | None = None,
) -> bytes:
    """The stream of symbols `[N]` uint8. runs: (length, table) that add up to N; frequencies: uint16 `[K, 256]`.

    impl: `cpu` (native), `naive`, or `auto`, the first that is there; the streams are the same. isa: of the native library,
    default the best. Raises `BadArgument` for runs that do not fit, or a symbol without a frequency in its table.
    """
    runs = _checked(runs, len(frequencies))
    if symbols.dtype != np.uint8 or symbols.shape != (runs.num_symbols,):
        raise BadArgument(
            f"symbols must be uint8 [N] with N = {runs.num_symbols}, the sum of the runs; got {symbols.dtype} {[*symbols.shape]}."
        )
    if _chosen(impl) == "naive":
        _check_frequencies(frequencies)
        return naive.encode(symbols, runs.pairs(), frequencies)
    last = np.cumsum(runs.lengths)
    strips = Strips(
        matrices=[np.ascontiguousarray(symbols)[None]], rows=np.zeros_like(runs.tables), tables=runs.tables,
        runs=np.arange(len(last), dtype=np.int32), ends=np.stack([last - runs.lengths, last], 1),
    )  # fmt: skip
    [stream] = encode_strips(strips, frequencies, isa=isa)
    return stream


@final
@dataclass(frozen=True, kw_only=True)
class Strips:
    """What is encoded into the streams of C chunks: pieces of S rows of matrices.

    matrices: uint8 `[R_m, n_m]`, contiguous; rows `[S]`: the row of each strip, counted through all of them. Chunk c has the
    symbols `ends[i, c]:ends[i, c + 1]` of strip i, int64 `[S, C + 1]`, coded by tables[i]; tables, runs int32 `[S]`:
    neighbours with the same number in `runs`, and so the same table, are one run.
    """

    matrices: Sequence[np.ndarray]
    rows: np.ndarray
    tables: np.ndarray
    runs: np.ndarray
    ends: np.ndarray

    @cached_property
    def addresses(self) -> np.ndarray:
        """Where each strip's row lies, int64 `[S]`; raises `BadArgument` unless all strips lie within their rows."""
        shapes = [m.shape for m in self.matrices]
        lengths = np.concatenate([np.full(count, length) for count, length in shapes])
        if not all(m.dtype == np.uint8 and m.flags.c_contiguous for m in self.matrices):
            raise BadArgument("strips must lie in contiguous matrices of uint8.")
        ends, rows = self.ends, self.rows
        kinds = (self.tables.dtype, self.runs.dtype, ends.dtype)
        if kinds != (np.int32, np.int32, np.int64) or not (
            rows.shape == self.tables.shape == self.runs.shape == ends.shape[:1]
        ):
            raise BadArgument("strips must have a row, a table and a run, int32, and ends, int64, each.")
        if len(rows) and not (
            0 <= rows.min() <= rows.max() < len(lengths)
            and ends[:, 0].min() >= 0
            and (ends[:, :-1] <= ends[:, 1:]).all()
            and (ends[:, -1] <= lengths[rows]).all()
        ):
            raise BadArgument("strips must lie within their rows, in order.")
        firsts = [native.address(m).value or 0 for m in self.matrices]
        starts = [
            a + np.arange(len(m), dtype=np.int64) * m.shape[1] for a, m in zip(firsts, self.matrices, strict=True)
        ]
        return np.concatenate(starts)[rows]

    def naive(self, chunk: int, frequencies: np.ndarray) -> bytes:
        """The stream of a chunk by the oracle."""
        all_rows = [row for matrix in self.matrices for row in matrix]
        parts, runs = [], list[tuple[int, int]]()
        for i, row in enumerate(self.rows.tolist()):
            parts.append(all_rows[row][self.ends[i, chunk] : self.ends[i, chunk + 1]])
            before = runs.pop()[0] if i and self.runs[i] == self.runs[i - 1] else 0
            runs.append((before + len(parts[-1]), int(self.tables[i])))
        return naive.encode(np.concatenate(parts) if parts else np.zeros(0, np.uint8), runs, frequencies)


def encode_strips(
    strips: Strips, frequencies: np.ndarray, *, impl: str = "auto", isa: str | None = None
) -> list[bytes]:
    """The stream of each chunk; other arguments and errors as in `encode`."""
    _check_frequencies(frequencies)
    tables, num_chunks = strips.tables, strips.ends.shape[1] - 1
    addresses = strips.addresses
    if len(tables) and not 0 <= tables.min() <= tables.max() < len(frequencies):
        raise BadArgument(f"strips must have one of {len(frequencies)} tables; got {tables.min()} to {tables.max()}.")
    if _chosen(impl) == "naive":
        return [strips.naive(chunk, frequencies) for chunk in range(num_chunks)]
    ends, frequencies = np.ascontiguousarray(strips.ends), np.ascontiguousarray(frequencies)
    num_bytes = np.zeros(num_chunks, np.int64)
    encode_native = native.library().steno_rans_encode
    encode_native.restype = ctypes.c_int64
    total = int((ends[:, -1] - ends[:, 0]).sum())
    for most_bytes in (1, 2):  # of a symbol; more than one is rare
        room = np.empty(most_bytes * total + num_chunks * STREAM_BYTES, np.uint8)
        status = encode_native(
            native.address(addresses), native.address(ends), native.address(tables), native.address(strips.runs),
            ctypes.c_int64(len(tables)), ctypes.c_int64(num_chunks),
            native.address(frequencies), ctypes.c_int64(len(frequencies)),
            native.address(room), ctypes.c_int64(len(room)), native.address(num_bytes),
            ctypes.c_int32(native.number_of_isa(isa)),
        )  # fmt: skip
        if status != -1:
            break
    if status == -3:
        raise MemoryError("no memory for the scratch of a native kernel.")
    if status < 0:
        raise BadArgument("every symbol of a run needs a frequency in its table; got one that lacks it.")
    last = np.cumsum(num_bytes)
    return [room[a:b].tobytes() for a, b in zip(last - num_bytes, last, strict=True)]


def decode(
    stream: bytes | memoryview | np.ndarray,
    runs: AnyRuns,
    tables: np.ndarray,
    *,
    impl: str = "auto",
    isa: str | None = None,
) -> np.ndarray:
    """The symbols `[N]` uint8 of a stream. runs: (length, table) as they were encoded; tables: of `decode_tables`.

    impl: as in `encode`; isa: of the native library, default the best. Raises `DamagedFile` if it is no stream of such
    symbols; it may also decode to other symbols, and never reads beyond its end.
    """
    if tables.dtype != np.uint32 or tables.ndim != 2 or tables.shape[1] != SLOTS:
        raise BadArgument(f"tables must be uint32 [K, {SLOTS}]; got {tables.dtype} {[*tables.shape]}.")
    runs = _checked(runs, len(tables))
    if _chosen(impl) == "naive":
        return naive.decode(bytes(stream), runs.pairs(), tables)
    data = np.ascontiguousarray(np.frombuffer(stream, np.uint8))
    tables = np.ascontiguousarray(tables)
    symbols = np.empty(runs.num_symbols, np.uint8)
    status = native.library().steno_rans_decode(
        native.address(data), ctypes.c_int64(len(data)), native.address(runs.lengths), native.address(runs.tables),
        ctypes.c_int64(len(runs.lengths)),
        native.address(tables), native.address(symbols), ctypes.c_int32(native.number_of_isa(isa)),
    )  # fmt: skip
    if status:
        raise DamagedFile("an entropy-coded stream does not decode to the symbols that it should have.")
    return symbols


def _check_frequencies(frequencies: np.ndarray) -> None:
    if frequencies.dtype != np.uint16 or frequencies.ndim != 2 or frequencies.shape[1] != SYMBOLS:
        raise BadArgument(f"frequencies must be uint16 [K, {SYMBOLS}]; got {frequencies.dtype} {[*frequencies.shape]}.")
    sums = frequencies.sum(1, dtype=np.int64)
    if (sums != SLOTS).any():
        raise BadArgument(f"the frequencies of a table must add up to {SLOTS}; got {sums[sums != SLOTS][0]}.")


def _chosen(impl: str) -> str:
    if impl not in IMPLS:
        raise BadArgument(f"unknown impl {impl!r}; {nearest(impl, IMPLS)}")
    if impl == "auto":
        return "cpu" if native.why_missing() is None else "naive"
    return impl


def _checked(runs: AnyRuns, num_tables: int) -> Runs:
    """Runs of these tables."""
    if not isinstance(runs, Runs):
        return Runs.of(runs, num_tables)
    if runs.num_tables != num_tables:
        raise BadArgument(f"these runs were made for {runs.num_tables} tables; got {num_tables}.")
    return runs
