"""A segment of heads that each multiply queries with their keys, and weights with their values, in a form of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    def keys_between(self, first: int, last: int) -> Tensor:
        """The keys `[last - first, D]` fp32 of some tokens; `first` is a multiple of 64."""
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

    def keys_between(self, first: int, last: int) -> Tensor:
        return torch.zeros(0, self.head_dim)

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

    def key_tiles(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        length = self.lengths[0]
        for first in range(0, length, num_tokens):
            last = min(first + num_tokens, length)
            yield torch.stack([head.keys_between(first, last).to(dtype) for head in self.heads])

    def products(self, q: Tensor) -> list[Tensor]:
        return [head.logits(x) for x, head in zip(q, self.heads, strict=True)]

    def mix(self, weights: Sequence[Tensor]) -> Tensor:
        return torch.stack([head.mix(w) for w, head in zip(weights, self.heads, strict=True)])
