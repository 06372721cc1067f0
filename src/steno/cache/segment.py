"""Segments: immutable runs of held tokens of one sequence of one layer.

Heads may differ in length: data is flat over heads, with offsets, never padded and never masked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from steno.kernels.attention import DenseSpan, PageSpan, Span, SpanTable, attend
from steno.kernels.quant import Pages, cat_pages, decode_pages, encode_pages
from steno.types import PAGE_TOKENS, PageFormat

HeadKV = tuple[Tensor, Tensor]
"""Keys and values `[n, D]` of one head."""


class Segment(ABC):
    """What a cache is made of: anything that can answer `attend` and be decoded."""

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Held tokens per KV head."""

    @abstractmethod
    def spans(self) -> list[Span]:
        """One span per KV head, for the kernels."""

    @abstractmethod
    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        """Dense keys and values per KV head, `[n_h, D]` each."""

    @property
    @abstractmethod
    def summaries(self) -> list[HeadKV] | None:
        """Per head the smallest and largest key of each page, `[P_h, D]` each; None if the recipe needs none."""

    @abstractmethod
    def prefix(self, lengths: Sequence[int], dtype: torch.dtype) -> list[Segment]:
        """Segments that hold only the first `lengths[h]` tokens of each head; whole pages stay as they are."""

    def attend(self, q: Tensor, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of q `[H, T, D]` over this segment alone: out `[H, T, D]` and log-sum-exp `[H, T]`."""
        table = SpanTable.build([[[span] for span in self.spans()]], head_dim=q.shape[-1])
        out, lse = attend(q[None], table, scale=scale, softcap=softcap, causal=False)
        return out[0], lse[0]


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


def page_summaries(keys: Tensor) -> HeadKV:
    """Smallest and largest key of each page of 64 tokens: keys `[n, D]` to two `[ceil(n/64), D]`."""
    n, dim = keys.shape
    full = n // PAGE_TOKENS
    pages = keys[: full * PAGE_TOKENS].reshape(full, PAGE_TOKENS, dim)
    low, high = [pages.amin(1)], [pages.amax(1)]  # [P, D]
    if n % PAGE_TOKENS:
        rest = keys[full * PAGE_TOKENS :]
        low.append(rest.amin(0, keepdim=True))
        high.append(rest.amax(0, keepdim=True))
    return torch.cat(low), torch.cat(high)


@final
@dataclass(frozen=True, kw_only=True)
class DenseSegment(Segment):
    """Tokens kept in a float format. keys, values: flat `[N, D]`, head h at `offsets[h]:offsets[h + 1]`."""

    keys: Tensor
    values: Tensor
    offsets: tuple[int, ...]
    page_bounds: tuple[HeadKV, ...] | None = None

    @classmethod
    def of(cls, heads: Sequence[HeadKV], *, summarize: bool = False) -> DenseSegment:
        """From keys and values `[n_h, D]` per head."""
        return cls(
            keys=owned(torch.cat([k for k, _ in heads])),
            values=owned(torch.cat([v for _, v in heads])),
            offsets=_offsets([k.shape[0] for k, _ in heads]),
            page_bounds=tuple(page_summaries(k) for k, _ in heads) if summarize else None,
        )

    @classmethod
    def uniform(cls, keys: Tensor, values: Tensor, *, summarize: bool = False) -> DenseSegment:
        """From keys and values `[Hkv, S, D]`; takes them over without a copy where it can."""
        num_heads, n, dim = keys.shape
        return cls(
            keys=owned(keys.reshape(num_heads * n, dim)),
            values=owned(values.reshape(num_heads * n, dim)),
            offsets=tuple(range(0, num_heads * n + 1, n)) if n else (0,) * (num_heads + 1),
            page_bounds=tuple(page_summaries(k) for k in keys) if summarize else None,
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    def spans(self) -> list[Span]:
        pairs = zip(_split(self.keys, self.offsets), _split(self.values, self.offsets), strict=True)
        return [DenseSpan(k, v) for k, v in pairs]

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        pairs = zip(_split(self.keys, self.offsets), _split(self.values, self.offsets), strict=True)
        return [(k.to(dtype), v.to(dtype)) for k, v in pairs]

    def prefix(self, lengths: Sequence[int], dtype: torch.dtype) -> list[Segment]:
        heads = [(k[:n], v[:n]) for (k, v), n in zip(self.decode(self.keys.dtype), lengths, strict=True)]
        return [DenseSegment.of(heads, summarize=self.page_bounds is not None)] if any(lengths) else []

    @property
    def summaries(self) -> list[HeadKV] | None:
        return list(self.page_bounds) if self.page_bounds is not None else None


@final
@dataclass(frozen=True, kw_only=True)
class PagedSegment(Segment):
    """Full quantized pages. pages: those of head h at `offsets[h]:offsets[h + 1]`."""

    pages: Pages
    offsets: tuple[int, ...]
    page_bounds: tuple[HeadKV, ...] | None = None

    @classmethod
    def encode(cls, heads: Sequence[HeadKV], fmt: PageFormat, *, summarize: bool = False) -> PagedSegment:
        """From keys and values `[n_h, D]` per head; every n_h is a multiple of 64."""
        dim = heads[0][0].shape[1]
        keys = torch.cat([k for k, _ in heads]).reshape(-1, PAGE_TOKENS, dim)
        values = torch.cat([v for _, v in heads]).reshape(-1, PAGE_TOKENS, dim)
        return cls(
            pages=encode_pages(keys, values, fmt),
            offsets=_offsets([k.shape[0] // PAGE_TOKENS for k, _ in heads]),
            page_bounds=tuple(page_summaries(k) for k, _ in heads) if summarize else None,
        )

    @classmethod
    def encode_rows(
        cls, keys: Tensor, values: Tensor, fmt: PageFormat, *, summarize: bool = False
    ) -> list[PagedSegment]:
        """A segment for each row of keys and values `[R, Hkv, n, D]`, n a multiple of 64, encoded from where they lie."""
        num_rows, num_heads, n = keys.shape[0], keys.shape[1], keys.shape[2] // PAGE_TOKENS
        pages = encode_pages(keys.unflatten(2, (n, PAGE_TOKENS)), values.unflatten(2, (n, PAGE_TOKENS)), fmt)
        return [
            cls(
                pages=pages[b * num_heads * n : (b + 1) * num_heads * n],
                offsets=_offsets([n] * num_heads),
                page_bounds=tuple(page_summaries(k) for k in keys[b]) if summarize else None,
            )
            for b in range(num_rows)
        ]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple((b - a) * PAGE_TOKENS for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    def _heads(self) -> list[Pages]:
        return [self.pages[a:b] for a, b in zip(self.offsets, self.offsets[1:], strict=False)]

    def spans(self) -> list[Span]:
        return [PageSpan(pages) for pages in self._heads()]

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        keys, values = decode_pages(self.pages, dtype)  # [P, 64, D]
        dim = keys.shape[-1]
        pairs = zip(_split(keys, self.offsets), _split(values, self.offsets), strict=True)
        return [(k.reshape(-1, dim), v.reshape(-1, dim)) for k, v in pairs]

    def prefix(self, lengths: Sequence[int], dtype: torch.dtype) -> list[Segment]:
        whole = [n // PAGE_TOKENS for n in lengths]
        summarize = self.page_bounds is not None
        segments: list[Segment] = []
        if any(whole):
            bounds = None
            if self.page_bounds is not None:
                bounds = tuple((low[:n], high[:n]) for (low, high), n in zip(self.page_bounds, whole, strict=True))
            pages = cat_pages([pages[:n] for pages, n in zip(self._heads(), whole, strict=True)])
            segments.append(PagedSegment(pages=pages, offsets=_offsets(whole), page_bounds=bounds))
        heads = self.decode(dtype)
        rest = [
            (k[p * PAGE_TOKENS : n], v[p * PAGE_TOKENS : n]) for (k, v), p, n in zip(heads, whole, lengths, strict=True)
        ]
        if any(len(k) for k, _ in rest):
            segments.append(DenseSegment.of(rest, summarize=summarize))
        return segments

    @property
    def summaries(self) -> list[HeadKV] | None:
        return list(self.page_bounds) if self.page_bounds is not None else None


def merge_segments(first: Segment, second: Segment) -> Segment | None:
    """One segment in place of two neighbours of the same class and format; None if they do not fit together."""
    if isinstance(first, DenseSegment) and isinstance(second, DenseSegment):
        if first.keys.dtype != second.keys.dtype:
            return None
        a, b = first.decode(first.keys.dtype), second.decode(second.keys.dtype)
        heads = [(torch.cat([ka, kb]), torch.cat([va, vb])) for (ka, va), (kb, vb) in zip(a, b, strict=True)]
        if any(n % PAGE_TOKENS for n in first.lengths) and first.page_bounds is not None:
            return None  # pages of the second would no longer start at a multiple of 64
        return DenseSegment.of(heads, summarize=first.page_bounds is not None)
    if isinstance(first, PagedSegment) and isinstance(second, PagedSegment) and first.pages.fmt == second.pages.fmt:
        parts = [page for pair in zip(first._heads(), second._heads(), strict=True) for page in pair]
        lengths = [(a + b) // PAGE_TOKENS for a, b in zip(first.lengths, second.lengths, strict=True)]
        bounds = None
        if first.page_bounds is not None and second.page_bounds is not None:
            bounds = tuple(
                (torch.cat([la, lb]), torch.cat([ha, hb]))
                for (la, ha), (lb, hb) in zip(first.page_bounds, second.page_bounds, strict=True)
            )
        return PagedSegment(pages=cat_pages(parts), offsets=_offsets(lengths), page_bounds=bounds)
    return None
