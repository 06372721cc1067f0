"""One sequence of one layer: a list of immutable segments, oldest first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from steno.cache.segment import Segment
from steno.cache.transformed import Basis


def pack_kept(indices: list[Tensor], num_tokens: int) -> Tensor:
    """Which of `num_tokens` prompt tokens each head kept, one bit each: uint8 `[Hkv, ceil(num_tokens / 8)]`."""
    bits = torch.zeros(len(indices), -(-num_tokens // 8) * 8, dtype=torch.uint8)
    for head, index in enumerate(indices):
        bits[head, index.cpu()] = 1
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (bits.view(len(indices), -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_kept(kept: Tensor) -> list[Tensor]:
    """The positions behind `pack_kept`, per head, ascending."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (kept[:, :, None] >> shifts) & 1  # [Hkv, bytes, 8]
    return [row.reshape(-1).nonzero()[:, 0] for row in bits]


@dataclass(kw_only=True)
class Row:
    """Segments of one sequence. The tail, which still grows, lies beside the rows in one buffer for the whole batch.

    kept: bitmap of `pack_kept` over the first `prompt_tokens` tokens; None if every token is held. Tokens after the
    prompt are all held. bases: those that later tokens change to when they are stored.
    """

    segments: list[Segment] = field(default_factory=list)
    kept: Tensor | None = None
    prompt_tokens: int = 0
    bases: tuple[Basis, ...] = ()

    def fork(self) -> Row:
        """A row that shares the segments; they never change."""
        return replace(self, segments=list(self.segments))

    def push(self, segment: Segment) -> None:
        """Appends a segment; neighbours of similar size become one, so their number grows with the logarithm."""
        self.segments.append(segment)
        while len(self.segments) > 1 and max(self.segments[-1].lengths) >= max(self.segments[-2].lengths):
            joined = self.segments[-2].joined(self.segments[-1])
            if joined is None:
                return
            self.segments[-2:] = [joined]

    def lengths(self, num_kv_heads: int) -> list[int]:
        """Held tokens per head, without the tail."""
        totals = [0] * num_kv_heads
        for segment in self.segments:
            totals = [a + b for a, b in zip(totals, segment.lengths, strict=True)]
        return totals


def positions_of(row: Row, seen: int, num_kv_heads: int) -> list[Tensor]:
    """True positions of what each head of a row holds that has seen `seen` tokens, the tail among it."""
    if row.kept is None:
        return [torch.arange(seen)] * num_kv_heads
    after = torch.arange(row.prompt_tokens, seen)
    return [torch.cat([index, after]) for index in unpack_kept(row.kept)]
