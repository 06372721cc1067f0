"""The oracle of the entropy coder: one symbol at a time, in Python's integers. csrc/rans.cpp has the same streams."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from steno.errors import BadArgument, DamagedFile

STATES = 32
SCALE_BITS = 12
SLOTS = 1 << SCALE_BITS
LOWEST = 1 << 16
"""A state is at least this between two symbols."""


def encode(symbols: np.ndarray, runs: Sequence[tuple[int, int]], frequencies: np.ndarray) -> bytes:
    """Arguments as in `steno.kernels.rans.encode`, which has checked them."""
    states, words, starts = [LOWEST] * STATES, [], np.cumsum(frequencies, axis=1) - frequencies
    end = len(symbols)
    for length, table in reversed(runs):
        for i in reversed(range(length)):
            symbol = symbols[end - length + i]
            frequency, start = int(frequencies[table, symbol]), int(starts[table, symbol])
            if not frequency:
                raise BadArgument("every symbol of a run needs a frequency in its table; got one that lacks it.")
            state = states[i % STATES]
            if state >= frequency << 20:
                words.append(state & 0xFFFF)
                state >>= 16
            states[i % STATES] = (state // frequency << SCALE_BITS) + state % frequency + start
        end -= length
    return struct.pack(f"<{STATES}I{len(words)}H", *states, *reversed(words))


def decode(stream: bytes, runs: Sequence[tuple[int, int]], tables: np.ndarray) -> np.ndarray:
    """Arguments and errors as in `steno.kernels.rans.decode`, which has checked the arguments."""
    if len(stream) < 4 * STATES or len(stream) % 2:
        raise DamagedFile(
            f"an entropy-coded stream has at least {4 * STATES} bytes and an even number; got {len(stream)}."
        )
    states = list(struct.unpack_from(f"<{STATES}I", stream))
    words, symbols = iter(struct.unpack_from(f"<{(len(stream) - 4 * STATES) // 2}H", stream, 4 * STATES)), bytearray()
    for length, table in runs:
        for i in range(length):
            state = states[i % STATES]
            entry = int(tables[table, state % SLOTS])
            symbols.append(entry & 0xFF)
            state = ((entry >> 8 & (SLOTS - 1)) + 1) * (state >> SCALE_BITS) + (entry >> 20)
            if state < LOWEST:
                word = next(words, None)
                if word is None:
                    raise DamagedFile("an entropy-coded stream ends too early.")
                state = state << 16 | word
            states[i % STATES] = state
    if next(words, None) is not None or states != [LOWEST] * STATES:
        raise DamagedFile("an entropy-coded stream does not end where its symbols do.")
    return np.frombuffer(bytes(symbols), np.uint8)
