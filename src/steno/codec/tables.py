"""Which table codes which part of a plane: parts with like statistics share one, and what gains too little stays raw.

Symbol statistics of a KV cache differ by layer and channel (CacheGen, Liu et al., 2023, https://arxiv.org/abs/2310.07240,
section 5.2).
Differs: channels are gathered into as few tables as pay for themselves instead of one each, since a table of its own
costs more than it saves on a short context; tables are measured on the context itself and stored with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from steno.errors import DamagedFile
from steno.kernels import rans

RAW = 255
"""In place of a table: these symbols are stored as they are."""

MIN_GAIN = 0.005
"""Share of its raw bytes that coding must save."""

MIN_SYMBOLS = 4096
"""Fewer are not worth a table, nor the time to find one."""

TABLE_COUNTS = (1, 4, 16, 64)
MAX_SPREAD_TABLES = 16
SPREAD_SYMBOLS = 8192
"""So many symbols are worth a table."""

ROUNDS = 4
TABLE_BITS = 8 * 32
"""Bits of a stored table beside 16 for each symbol in it: which symbols it has."""


@final
@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of one plane of one array. frequencies: uint16 `[K, 256]`; of_context: uint8 `[R]`, one of them or RAW."""

    frequencies: np.ndarray
    of_context: np.ndarray

    @cached_property
    def order(self) -> np.ndarray:
        """Contexts in the order in which they are stored: by table, raw ones last."""
        return np.argsort(self.of_context, kind="stable")

    @classmethod
    def choose(cls, counts: np.ndarray, *, stream_bytes: int) -> Tables:
        """The cheapest tables for counts `[R, 256]` of the symbols of each context. stream_bytes: what streams cost beside
        their symbols."""
        totals = counts.sum(1)
        best, best_bits = cls.raw(len(counts)), 8 * float(totals.sum()) * (1 - MIN_GAIN)
        for num_tables in TABLE_COUNTS:
            if num_tables > len(counts) and num_tables > 1:
                break
            tables = cls._clustered(counts, num_tables)
            bits = tables._bits(counts) + 8 * stream_bytes
            if bits < best_bits:
                best, best_bits = tables, bits
        return best

    @classmethod
    def by_spread(cls, counts: np.ndarray, *, stream_bytes: int) -> Tables:
        """Like `choose`, for contexts that differ in how spread their symbols are and in little else: quicker, and as good.

        Contexts in the order of their entropy share tables, as many of them each.
        """
        total = int(counts.sum())
        num_tables = max(1, min(MAX_SPREAD_TABLES, len(counts), total // SPREAD_SYMBOLS))
        used = np.flatnonzero(counts.sum(0))  # mostly few
        counts = np.ascontiguousarray(counts[:, used])
        order, of_context = np.argsort(_entropies(counts), kind="stable"), np.empty(len(counts), np.int64)
        of_context[order] = np.arange(len(counts)) * num_tables // len(counts)
        starts = -(-np.arange(num_tables) * len(counts) // num_tables)
        sums = np.add.reduceat(counts[order], starts, axis=0)
        frequencies = np.zeros((num_tables, rans.SYMBOLS), np.uint16)
        frequencies[:, used] = rans.normalize(sums)
        tables = cls(frequencies=frequencies, of_context=of_context.astype(np.uint8))
        bits = float((sums * (12 - np.log2(np.maximum(frequencies[:, used], 1)))).sum())
        is_raw = bits + 8 * (stream_bytes + tables.num_bytes) > 8 * total * (1 - MIN_GAIN)
        return cls.raw(len(counts)) if is_raw else tables

    @classmethod
    def raw(cls, num_contexts: int) -> Tables:
        """No table: all symbols are stored as they are."""
        return cls(frequencies=np.zeros((0, rans.SYMBOLS), np.uint16), of_context=np.full(num_contexts, RAW, np.uint8))

    @classmethod
    def _clustered(cls, counts: np.ndarray, num_tables: int) -> Tables:
        """Lloyd's algorithm under the length of the code, begun from contexts in the order of their mean symbol."""
        totals = counts.sum(1)
        means = counts @ np.arange(rans.SYMBOLS) / np.maximum(totals, 1)
        of_context = np.empty(len(counts), np.int64)
        of_context[np.argsort(means, kind="stable")] = np.arange(len(counts)) * num_tables // len(counts)
        for round_idx in range(ROUNDS):
            sums = np.eye(num_tables)[of_context].T @ counts  # exact: counts are below 2**53
            bits = _code_bits(counts, sums + 1e-3)
            of_context = bits.argmin(1)
            if round_idx == ROUNDS - 1:
                of_context = np.where(bits.min(1) > 8 * totals * (1 - MIN_GAIN), RAW, of_context)
        used = np.unique(of_context[of_context != RAW])
        sums = np.zeros((len(used), rans.SYMBOLS), np.int64)
        for i, table in enumerate(used):
            sums[i] = counts[of_context == table].sum(0)
            of_context[of_context == table] = i
        return cls(frequencies=rans.normalize(sums), of_context=of_context.astype(np.uint8))

    def _bits(self, counts: np.ndarray) -> float:
        """Bits of the symbols and of these tables."""
        total = 8.0 * (counts[self.of_context == RAW].sum() + self.num_bytes)
        for i, frequencies in enumerate(self.frequencies):
            sums = counts[self.of_context == i].sum(0)
            total += float(sums @ (12 - np.log2(np.maximum(frequencies, 1))))
        return total

    @property
    def num_bytes(self) -> int:
        """Of `to_bytes`."""
        return (
            len(self.of_context) + TABLE_BITS // 8 * len(self.frequencies) + 2 * int(np.count_nonzero(self.frequencies))
        )

    def to_bytes(self) -> bytes:
        """of_context, then of each table which of the 256 symbols it has, as a bitmap, and their frequencies."""
        bitmaps = np.packbits(self.frequencies > 0, axis=1, bitorder="little")  # [K, 32]
        parts = [self.of_context.tobytes()]
        for bitmap, row in zip(bitmaps, self.frequencies.astype("<u2"), strict=True):
            parts += [bitmap.tobytes(), row[row > 0].tobytes()]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: np.ndarray, num_contexts: int, num_tables: int) -> tuple[Tables, int]:
        """The inverse of `to_bytes`, and how many of the bytes it took; raises `DamagedFile` if they are no tables."""
        of_context, at = data[:num_contexts].copy(), num_contexts
        if len(of_context) < num_contexts or not ((of_context < num_tables) | (of_context == RAW)).all():
            raise DamagedFile("the tables of a plane name a table that is not there.")
        frequencies = np.zeros((num_tables, rans.SYMBOLS), np.uint16)
        for row in frequencies:
            present = np.unpackbits(data[at : at + 32], bitorder="little").astype(bool)
            end = at + 32 + 2 * int(present.sum())
            if len(present) < rans.SYMBOLS or end > len(data):
                raise DamagedFile("the tables end too early.")
            row[present] = data[at + 32 : end].copy().view("<u2")
            at = end
            if row.sum(dtype=np.int64) != rans.SLOTS:
                raise DamagedFile(f"the frequencies of a table must add up to {rans.SLOTS}; got {row.sum()}.")
        return cls(frequencies=frequencies, of_context=of_context), at


def _code_bits(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Bits of each context `[R, 256]` under each of `[K, 256]` sums: `[R, K]`."""
    return counts @ -np.log2(sums / sums.sum(1, keepdims=True)).T


def _entropies(counts: np.ndarray) -> np.ndarray:
    """Bits of a symbol of each context `[R, S]` in a table of its own, `[R]`."""
    totals = np.maximum(counts.sum(1), 1)
    return np.log2(totals) - (counts * np.log2(np.maximum(counts, 1))).sum(1) / totals
