"""Loading a context in time: each chunk is fetched at a quality level, or recomputed from its text, whichever meets the deadline.

Source: CacheGen (Liu et al., 2023, https://arxiv.org/abs/2310.07240), section 5.3 and algorithm 1.
Differs: text is not preferred to the best level but counts as equally good, so the faster of both is taken; decoding, which the
paper leaves out since it overlaps, is part of the estimate where it takes longer than fetching; a link is taken to be as fast
as it was over the last few chunks, or over the newest if that was slower, and a plan fills only a part of the time that is left,
where the paper goes by the newest chunk and fills all: on links that change that misses more deadlines (benchmarks/loading.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

from steno.errors import BadArgument

RECOMPUTE = -1
"""In place of a level: read the chunk's text instead of fetching anything."""

RECENT = 4
"""So many chunks tell how fast a link is."""


@final
@dataclass(frozen=True, kw_only=True)
class LoadableChunk:
    """A chunk that can be loaded. level_bytes: what it has at each quality level, the best first; none: text is all there is."""

    num_tokens: int
    level_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or any(size < 0 for size in self.level_bytes):
            raise BadArgument(f"a chunk needs `num_tokens` >= 1 and sizes >= 0; got {self}.")


@final
class LoadController:
    """Chooses how the next chunk is loaded. Mutable: it learns from what is `fetched` and `recomputed`.

    Parameters
    ----------
    chunks : sequence of LoadableChunk
        The context, in order; all have the same number of levels.
    deadline_s : float
        When everything is to be loaded, seconds from the start.
    fill : float
        The share of the time left that a plan may take, above 0 and at most 1; the rest is for a link that becomes slower.
    bytes_per_s, read_tok_per_s, decode_tok_per_s : float or None
        What is known of the link, of reading text and of decoding before the first chunk. Without `bytes_per_s` the first chunk
        is fetched at the middle level; without `read_tok_per_s` nothing is recomputed unless it must be; None of the last:
        decoding takes no time.

    Raises
    ------
    BadArgument
        If chunks differ in their levels, or a speed or the deadline is negative.
    """

    def __init__(
        self,
        chunks: Sequence[LoadableChunk],
        *,
        deadline_s: float,
        fill: float = 0.75,
        bytes_per_s: float | None = None,
        read_tok_per_s: float | None = None,
        decode_tok_per_s: float | None = None,
    ) -> None:
        if len({len(chunk.level_bytes) for chunk in chunks}) > 1:
            raise BadArgument("all chunks must have the same number of levels.")
        if any(x is not None and not x >= 0 for x in (deadline_s, bytes_per_s, read_tok_per_s, decode_tok_per_s)):
            raise BadArgument("`deadline_s` and speeds must be >= 0.")
        if not 0 < fill <= 1:
            raise BadArgument(f"`fill` must be above 0 and at most 1; got fill={fill}.")
        self.chunks, self.deadline_s, self.fill = list(chunks), deadline_s, fill
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # bytes and seconds of the newest fetches
        self.bytes_per_s, self.read_tok_per_s, self.decode_tok_per_s = bytes_per_s, read_tok_per_s, decode_tok_per_s
        self.num_levels = len(chunks[0].level_bytes) if chunks else 0

    def choose(self, idx: int, elapsed_s: float) -> int:
        """The level at which chunk `idx` is to be fetched, 0 the best, or `RECOMPUTE`.

        The best way that would bring all chunks from this one on in before the deadline; if there is none, the fastest.
        """
        if not self.num_levels:
            return RECOMPUTE
        if self.bytes_per_s is None and (self.read_tok_per_s is None or not idx):
            return self.num_levels // 2
        seconds = {way: self.seconds(idx, way) for way in (RECOMPUTE, *range(self.num_levels))}
        best = min((RECOMPUTE, 0), key=lambda way: (seconds[way], way == RECOMPUTE))
        for way in (best, *range(1, self.num_levels)):
            if seconds[way] <= self.fill * (self.deadline_s - elapsed_s):
                return way
        return min(seconds, key=lambda way: (seconds[way], way == RECOMPUTE, way))

    def seconds(self, idx: int, way: int) -> float:
        """What all chunks from `idx` on would take in one way, as far as is known."""
        rest = self.chunks[idx:]
        tokens = sum(chunk.num_tokens for chunk in rest)
        if way == RECOMPUTE:
            return _quotient(tokens, self.read_tok_per_s)
        fetch = _quotient(sum(chunk.level_bytes[way] for chunk in rest), self.bytes_per_s)
        if self.decode_tok_per_s is None:
            return fetch
        # while one chunk is decoded the next is fetched; only the last is waited for
        return max(fetch, _quotient(tokens, self.decode_tok_per_s)) + _quotient(
            rest[-1].num_tokens, self.decode_tok_per_s
        )

    def fetched(self, num_bytes: int, seconds: float) -> None:
        """Notes how fast the link was."""
        self._recent.append((num_bytes, max(seconds, 1e-9)))
        totals = [sum(column) for column in zip(*self._recent, strict=True)]
        self.bytes_per_s = min(num_bytes / self._recent[-1][1], totals[0] / totals[1])

    def recomputed(self, num_tokens: int, seconds: float) -> None:
        """Notes how fast text was read."""
        self.read_tok_per_s = num_tokens / max(seconds, 1e-9)

    def decoded(self, num_tokens: int, seconds: float) -> None:
        """Notes how fast a chunk was decoded."""
        self.decode_tok_per_s = num_tokens / max(seconds, 1e-9)


def _quotient(amount: float, speed: float | None) -> float:
    """Seconds for an amount at a speed; endless at none that is known."""
    return 0.0 if not amount else amount / speed if speed else float("inf")


def load_chunks(
    controller: LoadController,
    fetch: Callable[[int, int], bytes],
    decode: Callable[[int, int, bytes], None],
    recompute: Callable[[int], None],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> list[int]:
    """Loads all chunks of a controller, and says how: a level or `RECOMPUTE` for each.

    `fetch(idx, level)` gives bytes that `decode(idx, level, data)` takes in, in order and in a thread of its own, while the next
    chunk is fetched. `recompute(idx)` reads the text, and begins when all chunks before are there. What they raise is raised.
    """
    started, ways = clock(), []

    def decode_timed(idx: int, level: int, data: bytes) -> None:
        begun = clock()
        decode(idx, level, data)
        controller.decoded(controller.chunks[idx].num_tokens, clock() - begun)

    with ThreadPoolExecutor(1) as thread:
        waiting: list[Future[None]] = []
        for idx, chunk in enumerate(controller.chunks):
            way = controller.choose(idx, clock() - started)
            begun = clock()
            if way == RECOMPUTE:
                for future in waiting:
                    future.result()
                waiting, begun = [], clock()
                recompute(idx)
                controller.recomputed(chunk.num_tokens, clock() - begun)
            else:
                data = fetch(idx, way)
                controller.fetched(len(data), clock() - begun)
                waiting.append(thread.submit(decode_timed, idx, way, data))
            ways.append(way)
        for future in waiting:
            future.result()
    return ways
