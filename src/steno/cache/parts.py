"""A segment of heads that each multiply queries with their keys, and weights with their values, in a form of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from steno.cache.segment import HeadKV, Segment
from steno.types import KeptTokens


class HeadParts(Protocol):
    """The tokens of one KV head, `[n]` of them; M vectors are multiplied at a time."""

    @property
    def num_tokens(self) -> int: ...

    def logits(self, q: Tensor) -> Tensor:
        """Products `[M, n]` of queries `[M, D]` and keys."""
        ...

    def mix(self, weights: Tensor) -> Tensor:
        """Sums `[M, D]` of values with weights `[M, n]`."""
        ...

    def decode(self, dtype: torch.dtype) -> HeadKV: ...


@final
@dataclass(frozen=True)
class NoTokens:
    """A KV head, of so many channels, that holds nothing."""

    head_dim: int
    num_tokens: int = 0

    def logits(self, q: Tensor) -> Tensor:
        return q.new_zeros(len(q), 0)

    def mix(self, weights: Tensor) -> Tensor:
        return weights.new_zeros(len(weights), self.head_dim)

    def decode(self, dtype: torch.dtype) -> HeadKV:
        return torch.zeros(0, self.head_dim, dtype=dtype), torch.zeros(0, self.head_dim, dtype=dtype)


@final
@dataclass(frozen=True, kw_only=True)
class PartsSegment(Segment):
    """heads: one per KV head; counts: per head `[n_h]` fp32 logarithms, or None where every entry is one token."""

    heads: tuple[HeadParts, ...]
    counts: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, tokens: KeptTokens, encode: Callable[[int, Tensor, Tensor], HeadParts]) -> PartsSegment:
        """encode: from the index of a KV head and its keys and values `[n, D]` in fp32, n > 0."""
        heads = []
        for h, (k, v) in enumerate(zip(tokens.keys, tokens.values, strict=True)):
            heads.append(encode(h, k.float(), v.float()) if len(k) else NoTokens(k.shape[1]))
        counts = None if tokens.log_counts is None else tuple(c.clone() for c in tokens.log_counts)
        return cls(heads=tuple(heads), counts=counts)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(head.num_tokens for head in self.heads)

    @property
    def log_counts(self) -> list[Tensor] | None:
        return None if self.counts is None else list(self.counts)

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        return [head.decode(dtype) for head in self.heads]

    def attend(self, q: Tensor, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """Like `Segment.attend`; holds `[G * T, n]` of logits of one head at a time, and never the keys."""
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        grouped = q.to(compute).reshape(len(self.heads), -1, q.shape[2])  # [Hkv, G * T, D]
        outs, lses = [], []
        for h, head in enumerate(self.heads):
            logits = head.logits(grouped[h]) * scale  # [G * T, n]
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            logits = logits if self.counts is None else logits + self.counts[h]
            lse = logits.logsumexp(1)
            outs.append(head.mix((logits - lse.masked_fill(lse == -torch.inf, 0)[:, None]).exp()))
            lses.append(lse)
        return torch.stack(outs).reshape(q.shape).to(q.dtype), torch.stack(lses).reshape(q.shape[:2]).float()
