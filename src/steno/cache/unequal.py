"""Quantized pages whose keys and values differ in width, as a transform may leave them: no spans, but packed products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from steno.cache.segment import HeadKV, Segment
from steno.kernels.quant.sides import PageSide
from steno.types import PAGE_TOKENS, PageFormat


@final
@dataclass(frozen=True, kw_only=True)
class UnequalPagedSegment(Segment):
    """Full pages with keys of one width and values of another, those of head h at `offsets[h]:offsets[h + 1]`.

    counts: flat `[P * 64]` fp32 logarithms, or None where every entry is one token.
    """

    keys: PageSide
    values: PageSide
    offsets: tuple[int, ...]
    counts: Tensor | None = None

    @classmethod
    def encode(
        cls, heads: Sequence[HeadKV], fmt: PageFormat, *, log_counts: Sequence[Tensor] | None = None
    ) -> UnequalPagedSegment:
        """From keys `[n_h, Dk]`, values `[n_h, Dv]` and log counts `[n_h]` per head; every n_h is a multiple of 64."""
        keys, values = (torch.cat(list(x)).unflatten(0, (-1, PAGE_TOKENS)) for x in zip(*heads, strict=True))
        pages = [len(k) // PAGE_TOKENS for k, _ in heads]
        return cls(
            keys=PageSide.encode(keys, fmt, is_keys=True),
            values=PageSide.encode(values, fmt, is_keys=False),
            offsets=tuple(sum(pages[:h]) for h in range(len(pages) + 1)),
            counts=None if log_counts is None else torch.cat(list(log_counts)),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple((b - a) * PAGE_TOKENS for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    @property
    def log_counts(self) -> list[Tensor] | None:
        return None if self.counts is None else list(self.counts.split(self.lengths))

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        heads = zip(self._heads(self.keys), self._heads(self.values), strict=True)
        return [(k.decode(dtype).flatten(0, 1), v.decode(dtype).flatten(0, 1)) for k, v in heads]

    def _heads(self, side: PageSide) -> list[PageSide]:
        return [side[a:b] for a, b in zip(self.offsets, self.offsets[1:], strict=False)]

    def key_tiles(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        return self.keys.tiles(len(self.lengths), num_tokens, dtype)

    def products(self, q: Tensor) -> list[Tensor]:
        return [side.products(x) for x, side in zip(q, self._heads(self.keys), strict=True)]

    def mix(self, weights: Sequence[Tensor]) -> Tensor:
        return torch.stack([side.mix(w) for w, side in zip(weights, self._heads(self.values), strict=True)])

    def joined(self, later: Segment) -> Segment | None:
        if not isinstance(later, UnequalPagedSegment) or self.keys.fmt != later.keys.fmt:
            return None
        if self.counts is not None or later.counts is not None:
            return None
        pairs = zip(self.offsets, later.offsets, strict=True)
        offsets = tuple(a + b for a, b in pairs)
        total = self.offsets[-1]
        order: list[int] = []
        for h in range(len(offsets) - 1):
            order += range(self.offsets[h], self.offsets[h + 1])
            order += range(total + later.offsets[h], total + later.offsets[h + 1])
        index = torch.tensor(order, device=self.keys.codes.device)
        sides = {name: getattr(self, name).followed_by(getattr(later, name))[index] for name in ("keys", "values")}
        return replace(self, **sides, offsets=offsets)
