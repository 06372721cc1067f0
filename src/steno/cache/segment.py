"""Segments: immutable runs of held tokens of one sequence of one layer.

Heads may differ in length: data is flat over heads, with offsets, never padded and never masked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from steno.kernels.attention import DenseSpan, PageSpan, Span, SpanTable, attend, softmax_weights
from steno.kernels.quant import Pages, cat_pages, decode_pages, encode_pages
from steno.kernels.quant.sides import PageSide
from steno.types import PAGE_TOKENS, PageFormat

if TYPE_CHECKING:
    from steno.cache.transformed import HeadBasis

HeadKV = tuple[Tensor, Tensor]
"""Keys and values `[n, D]` of one head."""

TILE_TOKENS = 1024
"""Tokens that are opened at a time where a step must, so that the whole is never dense."""

MAX_LOGITS = 1 << 24
"""Logits that a segment without spans holds at a time."""


class Segment(ABC):
    """What a cache is made of: anything that can answer `attend` and be decoded."""

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Held tokens per KV head."""

    @abstractmethod
    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        """Dense keys and values per KV head, `[n_h, D]` each."""

    def spans(self) -> list[Span] | None:
        """One span per KV head, for the kernels; None if there is no such form, and `attend` answers by itself."""
        return None

    @property
    def bases(self) -> tuple[HeadBasis, ...]:
        """The bases in which spans lie, the first applied first; none: they are plain."""
        return ()

    @property
    def log_counts(self) -> list[Tensor] | None:
        """Per head what is added to the logits, `[n_h]` fp32: the log of how many tokens each entry stands for."""
        return None

    def key_tiles(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Keys `[Hkv, m, D]`, of so many tokens at a time, a multiple of 64; heads must not differ in length."""
        yield from torch.stack([k for k, _ in self.decode(dtype)]).split(num_tokens, dim=1)

    def products(self, q: Tensor) -> list[Tensor]:
        """Products `[M, n_h]` of q `[Hkv, M, D]`, fp32 or fp64, with the keys of each head."""
        return [x @ k.T for x, (k, _) in zip(q, self.decode(q.dtype), strict=True)]

    def mix(self, weights: Sequence[Tensor]) -> Tensor:
        """Sums `[Hkv, M, D]` of the values of each head with weights `[M, n_h]`, fp32 or fp64."""
        return torch.stack([w @ v for w, (_, v) in zip(weights, self.decode(weights[0].dtype), strict=True)])

    def prefix(self, lengths: Sequence[int], dtype: torch.dtype) -> list[Segment]:
        """Segments that hold only the first `lengths[h]` tokens of each head, as exactly as they are held here."""
        if not any(lengths):
            return []
        heads = [(k[:n], v[:n]) for (k, v), n in zip(self.decode(dtype), lengths, strict=True)]
        return [DenseSegment.of(heads, log_counts=_cut(self.log_counts, lengths))]

    def joined(self, later: Segment) -> Segment | None:
        """One segment in place of this one and its later neighbour; None if they do not fit together."""
        return None

    def attend(self, q: Tensor, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of q `[H, T, D]` over this segment alone: out `[H, T, D]` and log-sum-exp `[H, T]`.

        Without spans it is made of `products` and `mix`, with at most `MAX_LOGITS` logits at a time, or those of one token.
        """
        spans = self.spans()
        if spans is not None:
            table = SpanTable.build([[[span] for span in spans]], head_dim=q.shape[-1])
            out, lse = attend(q[None], table, scale=scale, softcap=softcap, causal=False)
            return out[0], lse[0]
        exact = q.to(torch.promote_types(q.dtype, torch.float32))
        grouped = exact.unflatten(0, (len(self.lengths), -1))  # [Hkv, G, T, D]
        step = max(1, MAX_LOGITS // max(1, q.shape[0] * max(self.lengths)))
        outs, lses = zip(*(self._attend_some(part, scale, softcap) for part in grouped.split(step, dim=2)), strict=True)
        return torch.cat(outs, dim=2).flatten(0, 1).to(q.dtype), torch.cat(lses, dim=2).flatten(0, 1).float()

    def _attend_some(self, q: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Out `[Hkv, G, T, D]` and log-sum-exp `[Hkv, G, T]` of q `[Hkv, G, T, D]`."""
        counts: Sequence[Tensor | None] = self.log_counts or [None] * len(self.lengths)
        weights, lses = zip(
            *(
                softmax_weights(x, scale=scale, softcap=softcap, log_counts=c)
                for x, c in zip(self.products(q.flatten(1, 2)), counts, strict=True)
            ),
            strict=True,
        )
        return self.mix(weights).unflatten(1, q.shape[1:3]), torch.stack(lses).unflatten(1, q.shape[1:3])


def _cut(per_head: Sequence[Tensor] | None, lengths: Sequence[int]) -> list[Tensor] | None:
    """The first `lengths[h]` entries of each head."""
    return None if per_head is None else [x[:n] for x, n in zip(per_head, lengths, strict=True)]


def _cat_counts(log_counts: Sequence[Tensor] | None) -> Tensor | None:
    return None if log_counts is None else torch.cat(list(log_counts))


def _split(flat: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    return [flat[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


def _offsets(lengths: Sequence[int]) -> tuple[int, ...]:
    total, offsets = 0, [0]
    for n in lengths:
        total += n
        offsets.append(total)
    return tuple(offsets)


def owned(x: Tensor) -> Tensor:
    """x itself if it is contiguous and alone in its storage, otherwise a copy that is."""
    if x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size():
        return x
    return x.clone(memory_format=torch.contiguous_format)


@final
@dataclass(frozen=True, kw_only=True)
class DenseSegment(Segment):
    """Tokens kept in a float format. keys, values: flat `[N, D]`, head h at `offsets[h]:offsets[h + 1]`.

    counts: flat `[N]` fp32 logarithms, or None where every entry is one token.
    """

    keys: Tensor
    values: Tensor
    offsets: tuple[int, ...]
    counts: Tensor | None = None

    @classmethod
    def of(cls, heads: Sequence[HeadKV], *, log_counts: Sequence[Tensor] | None = None) -> DenseSegment:
        """From keys and values `[n_h, D]`, and log counts `[n_h]`, per head."""
        return cls(
            keys=owned(torch.cat([k for k, _ in heads])),
            values=owned(torch.cat([v for _, v in heads])),
            offsets=_offsets([k.shape[0] for k, _ in heads]),
            counts=_cat_counts(log_counts),
        )

    @classmethod
    def uniform(cls, keys: Tensor, values: Tensor) -> DenseSegment:
        """From keys and values `[Hkv, S, D]`; takes them over without a copy where it can."""
        num_heads, n, dim = keys.shape
        return cls(
            keys=owned(keys.reshape(num_heads * n, dim)),
            values=owned(values.reshape(num_heads * n, dim)),
            offsets=tuple(range(0, num_heads * n + 1, n)) if n else (0,) * (num_heads + 1),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    def spans(self) -> list[Span] | None:
        if self.keys.shape[1] != self.values.shape[1]:
            return None  # a low rank may be another for keys than for values
        counts: Sequence[Tensor | None] = self.log_counts or [None] * (len(self.offsets) - 1)
        return [DenseSpan(k, v, c) for (k, v), c in zip(self._heads(), counts, strict=True)]

    def _heads(self) -> list[HeadKV]:
        return list(zip(_split(self.keys, self.offsets), _split(self.values, self.offsets), strict=True))

    @property
    def log_counts(self) -> list[Tensor] | None:
        return None if self.counts is None else _split(self.counts, self.offsets)

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        return [(k.to(dtype), v.to(dtype)) for k, v in self._heads()]

    def key_tiles(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        for part in self.keys.unflatten(0, (len(self.lengths), -1)).split(num_tokens, dim=1):
            yield part.to(dtype)

    def products(self, q: Tensor) -> list[Tensor]:
        keys = [k.split(TILE_TOKENS) for k, _ in self._heads()]
        return [torch.cat([x @ k.to(x.dtype).T for k in tiles], dim=1) for x, tiles in zip(q, keys, strict=True)]

    def mix(self, weights: Sequence[Tensor]) -> Tensor:
        outs = []
        for w, (_, v) in zip(weights, self._heads(), strict=True):
            tiles = zip(w.split(TILE_TOKENS, dim=1), v.split(TILE_TOKENS), strict=True)
            outs.append(torch.stack([part @ x.to(w.dtype) for part, x in tiles]).sum(0))
        return torch.stack(outs)

    def prefix(self, lengths: Sequence[int], dtype: torch.dtype) -> list[Segment]:
        heads = [(k[:n], v[:n]) for (k, v), n in zip(self._heads(), lengths, strict=True)]
        counts = _cut(self.log_counts, lengths)
        return [DenseSegment.of(heads, log_counts=counts)] if any(lengths) else []

    def joined(self, later: Segment) -> Segment | None:
        if not isinstance(later, DenseSegment) or self.keys.dtype != later.keys.dtype:
            return None
        if self.counts is not None or later.counts is not None:
            return None  # few segments have counts, and they are not to spread
        if any(n % PAGE_TOKENS for n in self.lengths):
            return None  # pages of the later one would no longer start at a multiple of 64
        pairs = zip(self._heads(), later._heads(), strict=True)
        heads = [(torch.cat([ka, kb]), torch.cat([va, vb])) for (ka, va), (kb, vb) in pairs]
        return DenseSegment.of(heads)


@final
@dataclass(frozen=True, kw_only=True)
class PagedSegment(Segment):
    """Full quantized pages. pages: those of head h at `offsets[h]:offsets[h + 1]`.

    counts: flat `[P * 64]` fp32 logarithms, or None where every entry is one token.
    """

    pages: Pages
    offsets: tuple[int, ...]
    counts: Tensor | None = None

    @classmethod
    def encode(
        cls,
        heads: Sequence[HeadKV],
        fmt: PageFormat,
        *,
        log_counts: Sequence[Tensor] | None = None,
    ) -> PagedSegment:
        """From keys and values `[n_h, D]`, and log counts `[n_h]`, per head; every n_h is a multiple of 64."""
        dim = heads[0][0].shape[1]
        keys = torch.cat([k for k, _ in heads]).reshape(-1, PAGE_TOKENS, dim)
        values = torch.cat([v for _, v in heads]).reshape(-1, PAGE_TOKENS, dim)
        return cls(
            pages=encode_pages(keys, values, fmt),
            offsets=_offsets([k.shape[0] // PAGE_TOKENS for k, _ in heads]),
            counts=_cat_counts(log_counts),
        )

    @classmethod
    def encode_rows(cls, keys: Tensor, values: Tensor, fmt: PageFormat) -> list[PagedSegment]:
        """A segment for each row of keys and values `[R, Hkv, n, D]`, n a multiple of 64, encoded from where they lie."""
        num_rows, num_heads, n = keys.shape[0], keys.shape[1], keys.shape[2] // PAGE_TOKENS
        pages = encode_pages(keys.unflatten(2, (n, PAGE_TOKENS)), values.unflatten(2, (n, PAGE_TOKENS)), fmt)
        return [
            cls(
                pages=pages[b * num_heads * n : (b + 1) * num_heads * n],
                offsets=_offsets([n] * num_heads),
            )
            for b in range(num_rows)
        ]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple((b - a) * PAGE_TOKENS for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    def key_tiles(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        return PageSide.of(self.pages, is_keys=True).tiles(len(self.lengths), num_tokens, dtype)

    def products(self, q: Tensor) -> list[Tensor]:
        sides = (PageSide.of(pages, is_keys=True) for pages in self._heads())
        return [side.products(x) for x, side in zip(q, sides, strict=True)]

    def mix(self, weights: Sequence[Tensor]) -> Tensor:
        sides = (PageSide.of(pages, is_keys=False) for pages in self._heads())
        return torch.stack([side.mix(w) for w, side in zip(weights, sides, strict=True)])

    def _heads(self) -> list[Pages]:
        return [self.pages[a:b] for a, b in zip(self.offsets, self.offsets[1:], strict=False)]

    @property
    def log_counts(self) -> list[Tensor] | None:
        return None if self.counts is None else _split(self.counts, [PAGE_TOKENS * n for n in self.offsets])

    def spans(self) -> list[Span]:
        counts: Sequence[Tensor | None] = self.log_counts or [None] * (len(self.offsets) - 1)
        return [PageSpan(pages, c) for pages, c in zip(self._heads(), counts, strict=True)]

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        keys, values = decode_pages(self.pages, dtype)  # [P, 64, D]
        dim = keys.shape[-1]
        pairs = zip(_split(keys, self.offsets), _split(values, self.offsets), strict=True)
        return [(k.reshape(-1, dim), v.reshape(-1, dim)) for k, v in pairs]

    def prefix(self, lengths: Sequence[int], dtype: torch.dtype) -> list[Segment]:
        whole = [n // PAGE_TOKENS for n in lengths]
        counts = self.log_counts
        segments: list[Segment] = []
        if any(whole):
            pages = cat_pages([pages[:n] for pages, n in zip(self._heads(), whole, strict=True)])
            kept = _cat_counts(_cut(counts, [n * PAGE_TOKENS for n in whole]))
            segments.append(PagedSegment(pages=pages, offsets=_offsets(whole), counts=kept))
        slices = [slice(p * PAGE_TOKENS, n) for p, n in zip(whole, lengths, strict=True)]
        rest = [(k[part], v[part]) for (k, v), part in zip(self.decode(dtype), slices, strict=True)]
        if any(len(k) for k, _ in rest):
            left = None if counts is None else [c[part] for c, part in zip(counts, slices, strict=True)]
            segments.append(DenseSegment.of(rest, log_counts=left))
        return segments

    def joined(self, later: Segment) -> Segment | None:
        if not isinstance(later, PagedSegment) or self.pages.fmt != later.pages.fmt:
            return None
        if self.counts is not None or later.counts is not None:
            return None
        parts = [page for pair in zip(self._heads(), later._heads(), strict=True) for page in pair]
        lengths = [(a + b) // PAGE_TOKENS for a, b in zip(self.lengths, later.lengths, strict=True)]
        return PagedSegment(pages=cat_pages(parts), offsets=_offsets(lengths))
