"""GEAR: quantized tokens, plus a few exact outliers, plus a low-rank approximation of what both leave over.

Source: Kang, Zhang, Kundu, Jeong, Liu, Krishna, Zhao, 2024, https://arxiv.org/abs/2403.05527, section 3; the backbone is that
    of the authors' code, keys per channel and values per token in groups of g.
Differs: every KV head has outliers of its own, round(s / 2 n) at each end of a vector of n numbers (the paper's value vectors
    run through all heads); an outlier is held as its distance from the backbone, in fp16. Of decode buffers as of the
    prompt, each token is compressed once, with factors of its own chunk. The power iteration is seeded.
Cost: `iterations` products of a head's tokens with r vectors when a chunk closes; per step products with the packed codes and
    with the factors, and sums over the outliers: nothing is expanded. Per value bits + 32 / group, 16 r (n + D) / (n D) of
    the factors, and about 32 s (keys), 24 s (values) of the outliers, n the tokens of the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.parts import PartsSegment
from steno.cache.segment import HeadKV, Segment
from steno.kernels.quant import page_bytes
from steno.kernels.quant.groups import FP16_MAX, as_half
from steno.kernels.quant.matrices import Matrices, column_products, pack_integers, row_products
from steno.methods.checks import require_choice, require_int, require_multiple, require_real
from steno.types import PAGE_TOKENS, KeptTokens, Need, PageFormat


@final
@dataclass(frozen=True, kw_only=True)
class Outliers:
    """What a few numbers of a matrix `[R, C]` lie away from its backbone: `[R, 2k]` columns and fp16 distances."""

    columns: Tensor
    distances: Tensor

    def add_to(self, matrix: Tensor) -> Tensor:
        return matrix.scatter_add(1, self.columns.long(), self.distances.to(matrix.dtype))

    def between(self, first: int, last: int) -> Outliers:
        """Those of some columns, counted from `first`; the places of the others hold a distance of 0."""
        columns = self.columns.long() - first
        inside = (columns >= 0) & (columns < last - first)
        return Outliers(columns=columns * inside, distances=self.distances.where(inside, 0))

    def row_products(self, x: Tensor, num_columns: int) -> Tensor:
        """x `[M, R]` times the sparse matrix, `[M, C]`."""
        terms = (x[:, :, None] * self.distances.to(x.dtype)).flatten(1)  # [M, R * 2k]
        return x.new_zeros(len(x), num_columns).index_add_(1, self.columns.long().flatten(), terms)


@final
@dataclass(frozen=True, kw_only=True)
class Factors:
    """A matrix `[n, D]` of rank r: left `[n, r]` times right transposed `[D, r]`, both fp16."""

    left: Tensor
    right: Tensor

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.left.to(dtype) @ self.right.to(dtype).T


@final
@dataclass(frozen=True, kw_only=True)
class GearHead:
    """One KV head of one chunk: keys as matrices `[D, 64]`, values as `[64, D]`, with what makes up for their errors."""

    keys: Matrices
    values: Matrices
    key_outliers: Outliers
    value_outliers: Outliers
    key_factors: Factors
    value_factors: Factors

    @property
    def num_tokens(self) -> int:
        return self.keys.num_matrices * PAGE_TOKENS

    def logits(self, q: Tensor) -> Tensor:
        factors = self.key_factors
        low_rank = (q @ factors.right.to(q.dtype)) @ factors.left.to(q.dtype).T
        return row_products(q, self.keys) + low_rank + self.key_outliers.row_products(q, self.num_tokens)

    def mix(self, weights: Tensor) -> Tensor:
        factors, dim = self.value_factors, self.values.columns
        low_rank = (weights @ factors.left.to(weights.dtype)) @ factors.right.to(weights.dtype).T
        return column_products(weights, self.values) + low_rank + self.value_outliers.row_products(weights, dim)

    def keys_between(self, first: int, last: int) -> Tensor:
        pages = self.keys[first // PAGE_TOKENS : last // PAGE_TOKENS]
        backbone = pages.decode().transpose(0, 1).flatten(1)  # [D, m]
        factors = Factors(left=self.key_factors.left[first:last], right=self.key_factors.right)
        return self.key_outliers.between(first, last).add_to(backbone).T + factors.matrix(torch.float32)

    def decode(self, dtype: torch.dtype) -> HeadKV:
        keys = self.keys_between(0, self.num_tokens)
        values = self.values.decode().flatten(0, 1)  # [n, D]
        values = self.value_outliers.add_to(values) + self.value_factors.matrix(torch.float32)
        return keys.to(dtype), values.to(dtype)


def low_rank(error: Tensor, rank: int, iterations: int) -> Factors:
    """The projection of a matrix `[n, D]` on the r columns that a power iteration finds: Q and EᵀQ with L = Q Qᵀ E."""
    rows, columns = error.shape
    rank = min(rank, rows, columns)
    generator = torch.Generator().manual_seed(rank)
    right = torch.rand(columns, rank, generator=generator).to(error.device)
    left = error.new_zeros(rows, rank)
    for step in range(iterations):
        if step == iterations - 1:
            right = torch.linalg.qr(right).Q
        left = error @ right
        if step == iterations - 1:
            left = torch.linalg.qr(left).Q
        right = error.T @ left
        right = right / right.norm().clamp(min=1e-30) if step < iterations - 1 else right  # else it may overflow
    return Factors(left=left.half(), right=as_half(right).half())


def outlier_columns(matrix: Tensor, share: float) -> Tensor:
    """Where the largest and smallest numbers of each row of `[R, C]` are, `[R, 2k]`, k = round(share / 2 * C)."""
    count = min(int(share / 2 * matrix.shape[1] + 0.5), matrix.shape[1] // 2)
    low = matrix.topk(count, largest=False).indices
    rest = matrix.scatter(1, low, -torch.inf)  # no place at both ends, where numbers are equal
    return torch.cat([low, rest.topk(count).indices], dim=1)


def without(matrix: Tensor, columns: Tensor) -> Tensor:
    """The matrix with the numbers at `columns` `[R, 2k]` replaced by the mean of their row."""
    return matrix.scatter(1, columns, matrix.mean(1, keepdim=True).expand(columns.shape))


def distances(matrix: Tensor, backbone: Tensor, columns: Tensor) -> Outliers:
    """The outliers of a matrix, relative to its backbone; after this the two agree there, up to fp16."""
    width = matrix.shape[1]
    kind = torch.uint8 if width <= 1 << 8 else torch.int16 if width <= 1 << 15 else torch.int32
    away = as_half((matrix - backbone).gather(1, columns)).half()
    return Outliers(columns=columns.to(kind), distances=away)


@final
@dataclass(frozen=True, kw_only=True)
class GEAR:
    """Low-bit tokens with their errors approximated.

    Parameters
    ----------
    bits : int, default 2 bits
        8, 4 or 2, of the backbone.
    group : int, default 64
        Tokens of a key channel, and channels of a value, that share a scale: 16, 32 or 64.
    outliers : float, default 0.02
        Share of the numbers of each vector that are kept exactly, half of them at each end; 0 is GEAR-L.
    rank : int, default 4
        Rank of the approximation over the prompt.
    buffer_rank : int, default 2
        The same over tokens that come later.
    buffer : int, default 64 tokens
        Later tokens are compressed when there are so many; a multiple of 64.
    iterations : int, default 3
        Steps of the power iteration.

    Raises
    ------
    BadArgument
        If a value is none of these.
    """

    id: ClassVar[str] = "gear"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "GEAR"
    paper: ClassVar[str] = (
        "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM"
    )
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2403.05527"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Every KV head has outliers of its own, rounded to a whole number at each end of a vector, as distances from the "
        "backbone in fp16; each token is compressed once; the power iteration is seeded."
    )
    page_format: ClassVar[None] = None

    bits: int = 2
    group: int = 64
    outliers: float = 0.02
    rank: int = 4
    buffer_rank: int = 2
    buffer: int = 64
    iterations: int = 3

    def __post_init__(self) -> None:
        require_choice("bits", self.bits, (8, 4, 2))
        require_choice("group", self.group, (16, 32, 64))
        require_real("outliers", self.outliers, 0, 1)
        require_int("rank", self.rank, 1, 256)
        require_int("buffer_rank", self.buffer_rank, 1, 256)
        require_multiple("buffer", self.buffer, PAGE_TOKENS)
        require_int("iterations", self.iterations, 1, 100)

    @property
    def residual_tokens(self) -> int:
        return self.buffer

    @property
    def chunk_tokens(self) -> int:
        return PAGE_TOKENS

    def encode(self, tokens: KeptTokens) -> Segment:
        """Each head with a backbone, outliers and factors of its own."""
        rank = self.rank if tokens.is_prompt else self.buffer_rank
        return PartsSegment.of(tokens, lambda _, keys, values: self._head(keys, values, rank))

    def _head(self, keys: Tensor, values: Tensor, rank: int) -> GearHead:
        """keys, values `[n, D]` fp32; beyond fp16 they are cut, as in every format with scales in it."""
        keys, values = (x.clamp(-FP16_MAX, FP16_MAX) for x in (keys, values))
        channels = keys.T  # [D, n]
        where, value_where = outlier_columns(channels, self.outliers), outlier_columns(values, self.outliers)
        pages = without(channels, where).unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1)  # [P, D, 64]
        packed = pack_integers(pages, bits=self.bits, group=self.group)
        rows = without(values, value_where).unflatten(0, (-1, PAGE_TOKENS))  # [P, 64, D]
        value_packed = pack_integers(rows, bits=self.bits, group=self.group)
        key_backbone = packed.decode().transpose(0, 1).flatten(1)
        value_backbone = value_packed.decode().flatten(0, 1)
        key_outliers = distances(channels, key_backbone, where)
        value_outliers = distances(values, value_backbone, value_where)
        return GearHead(
            keys=packed,
            values=value_packed,
            key_outliers=key_outliers,
            value_outliers=value_outliers,
            key_factors=low_rank((channels - key_outliers.add_to(key_backbone)).T, rank, self.iterations),
            value_factors=low_rank(values - value_outliers.add_to(value_backbone), rank, self.iterations),
        )

    def bytes_bound(self, num_tokens: int, *, num_kv_heads: int, head_dim: int) -> int | None:
        """Backbone, factors of the larger rank and outliers, with the widest indices."""
        pages = -(-num_tokens // PAGE_TOKENS)
        fmt = PageFormat(bits=self.bits, key_group=self.group, value_group=self.group)
        factors = 2 * 2 * max(self.rank, self.buffer_rank) * (num_tokens + head_dim)
        width = 4 if num_tokens * num_kv_heads > 1 << 15 else 2
        key_outliers = head_dim * (self.outliers * num_tokens + 1) * (2 + width)
        value_outliers = num_tokens * (self.outliers * head_dim + 1) * (2 + (1 if head_dim <= 1 << 8 else 2))
        return num_kv_heads * (pages * page_bytes(fmt, head_dim) + ceil(factors + key_outliers + value_outliers))
