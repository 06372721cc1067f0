"""Segments in another basis: what they hold is transformed, queries come to them and outputs go back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from steno.cache.segment import HeadKV, Segment
from steno.kernels.attention import Span
from steno.types import KeptTokens

ALL_HEADS = slice(None)


class Basis(ABC):
    """A change of basis that was fit to one sequence of one layer, or to none. Immutable."""

    @abstractmethod
    def change(self, tokens: KeptTokens) -> KeptTokens:
        """The tokens in this basis, and so the queries that were observed, where the basis has a query side."""

    @abstractmethod
    def wrap(self, inner: Segment, tokens: KeptTokens) -> Segment:
        """A segment of plain tokens from `inner`, which holds `change(tokens)`."""


class HeadBasis(Basis):
    """A basis of each KV head, between RoPE and attention: q'.k' stands for q.k, and outputs come back linearly.

    Every map takes `[..., h, n, d]` of the KV heads `heads`, and is linear in it.
    """

    @abstractmethod
    def keys(self, k: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        """`[..., h, n, D]` to `[..., h, n, Dk]`."""

    @abstractmethod
    def queries(self, q: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        """`[..., h, n, D]`, the n queries of all query heads of a KV head, to `[..., h, n, Dk]`."""

    @abstractmethod
    def plain_keys(self, k: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        """`[..., h, n, Dk]` to `[..., h, n, D]`, the transpose of `queries`: q . plain_keys(k') = queries(q) . k'."""

    @abstractmethod
    def values(self, v: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        """`[..., h, n, D]` to `[..., h, n, Dv]`."""

    @abstractmethod
    def outputs(self, o: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        """`[..., h, n, Dv]` to `[..., h, n, D]`; of values that were transformed as of outputs made from them."""

    def change(self, tokens: KeptTokens) -> KeptTokens:
        seen = tokens.observation
        if seen is not None and seen.queries is not None:  # a transform behind this one looks at both
            seen = replace(seen, queries=turn_queries([self], seen.queries, len(tokens.keys)))
        keys, values = _each_head(self.keys, tokens.keys), _each_head(self.values, tokens.values)
        return replace(tokens, keys=keys, values=values, observation=seen)

    def wrap(self, inner: Segment, tokens: KeptTokens) -> Segment:
        return TransformedSegment(inner=inner, basis=self)


def _each_head(turn: Callable[[Tensor, slice], Tensor], heads: Sequence[Tensor]) -> list[Tensor]:
    """`turn` on `[n_h, d]` of every KV head."""
    return [turn(x[None], slice(h, h + 1))[0] for h, x in enumerate(heads)]


def turn_queries(bases: Sequence[HeadBasis], q: Tensor, num_kv_heads: int) -> Tensor:
    """Queries `[..., H, T, D]` in these bases, the first applied first: `[..., H, T, Dk]`."""
    grouped = q.unflatten(-3, (num_kv_heads, -1))  # [..., Hkv, G, T, D]
    turned = grouped.flatten(-3, -2)
    for basis in bases:
        turned = basis.queries(turned)
    return turned.unflatten(-2, grouped.shape[-3:-1]).flatten(-4, -3)


def turn_outputs(bases: Sequence[HeadBasis], out: Tensor, num_kv_heads: int) -> Tensor:
    """Outputs `[..., H, T, Dv]` back from these bases: `[..., H, T, D]`."""
    grouped = out.unflatten(-3, (num_kv_heads, -1))
    turned = grouped.flatten(-3, -2)
    for basis in reversed(bases):
        turned = basis.outputs(turned)
    return turned.unflatten(-2, grouped.shape[-3:-1]).flatten(-4, -3)


@final
@dataclass(frozen=True, kw_only=True)
class TransformedSegment(Segment):
    """Tokens held by `inner` in `basis`. Its spans are in that basis."""

    inner: Segment
    basis: HeadBasis

    @property
    def bases(self) -> tuple[HeadBasis, ...]:
        return (self.basis, *self.inner.bases)

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.inner.lengths

    @property
    def log_counts(self) -> list[Tensor] | None:
        return self.inner.log_counts

    def spans(self) -> list[Span] | None:
        return self.inner.spans()

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        keys, values = zip(*self.inner.decode(dtype), strict=True)
        return list(zip(_each_head(self.basis.plain_keys, keys), _each_head(self.basis.outputs, values), strict=True))

    def key_tiles(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        return map(self.basis.plain_keys, self.inner.key_tiles(num_tokens, dtype))

    def products(self, q: Tensor) -> list[Tensor]:
        return self.inner.products(self.basis.queries(q))

    def mix(self, weights: Sequence[Tensor]) -> Tensor:
        return self.basis.outputs(self.inner.mix(weights))

    def prefix(self, lengths: Sequence[int], dtype: torch.dtype) -> list[Segment]:
        return [replace(self, inner=part) for part in self.inner.prefix(lengths, dtype)]

    def joined(self, later: Segment) -> Segment | None:
        if not isinstance(later, TransformedSegment) or later.basis is not self.basis:
            return None
        inner = self.inner.joined(later.inner)
        return None if inner is None else replace(self, inner=inner)

    def attend(self, q: Tensor, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        heads = len(self.lengths)
        out, lse = self.inner.attend(turn_queries([self.basis], q, heads), scale, softcap)
        return turn_outputs([self.basis], out, heads), lse


@final
@dataclass(frozen=True, kw_only=True)
class MatrixBasis(HeadBasis):
    """One orthogonal matrix for all heads, or one for each: keys, queries and values are multiplied by it.

    key_matrix, value_matrix: `[Hkv or 1, D, D]` fp32, orthonormal rows.
    """

    key_matrix: Tensor
    value_matrix: Tensor

    def keys(self, k: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        return _times(k, _of(self.key_matrix, heads))

    def queries(self, q: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        return _times(q, _of(self.key_matrix, heads))

    def plain_keys(self, k: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        return _times(k, _of(self.key_matrix, heads).mT)

    def values(self, v: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        return _times(v, _of(self.value_matrix, heads))

    def outputs(self, o: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        return _times(o, _of(self.value_matrix, heads).mT)


def _of(matrix: Tensor, heads: slice) -> Tensor:
    return matrix if matrix.shape[0] == 1 else matrix[heads]


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x `[..., h, n, d]` times `[h or 1, d, d']`, in the matrix's precision or better, in x's dtype."""
    compute = torch.promote_types(x.dtype, matrix.dtype)
    return (x.to(compute) @ matrix.to(compute)).to(x.dtype)
