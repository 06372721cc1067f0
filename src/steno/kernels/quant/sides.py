"""One side of pages by itself: keys or values alone, where they differ in width or meet queries and weights apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.types import PAGE_TOKENS, PageFormat

from .codebooks import CODEBOOKS, dequantize_tokens, quantize_tokens
from .groups import dequantize_groups, quantize_groups
from .matrices import BLOCK, Matrices, column_products, row_products
from .packing import pack_codes, unpack_codes
from .pages import Pages


@final
@dataclass(frozen=True, kw_only=True)
class PageSide:
    """Keys or values of P pages of one format. codes: `[P, bytes]` uint8; params: as in `Pages`; dim: their width."""

    fmt: PageFormat
    is_keys: bool
    dim: int
    codes: Tensor
    params: Tensor

    @classmethod
    def of(cls, pages: Pages, *, is_keys: bool) -> PageSide:
        """One side of these pages, as views."""
        codes, params = (pages.key_codes, pages.key_params) if is_keys else (pages.value_codes, pages.value_params)
        return cls(fmt=pages.fmt, is_keys=is_keys, dim=pages.head_dim, codes=codes, params=params)

    @classmethod
    def encode(cls, x: Tensor, fmt: PageFormat, *, is_keys: bool) -> PageSide:
        """From tokens `[P, 64, dim]`."""
        if fmt.bits not in (8, 4, 2) or x.ndim != 3 or x.shape[1] != PAGE_TOKENS:
            raise BadArgument(f"a side takes [P, {PAGE_TOKENS}, dim] and 8, 4 or 2 bits; got {[*x.shape]}, {fmt}.")
        if fmt.codebook is not None:
            codes, params = quantize_tokens(x, CODEBOOKS[fmt.codebook], fmt.key_group if is_keys else fmt.value_group)
            packed = pack_codes(codes.transpose(1, 2) if is_keys else codes, fmt.bits)
            return cls(fmt=fmt, is_keys=is_keys, dim=x.shape[2], codes=packed, params=params)
        matrix, group = (x.transpose(1, 2), fmt.key_group) if is_keys else (x, fmt.value_group)
        codes, params = quantize_groups(matrix, bits=fmt.bits, group=group)
        return cls(fmt=fmt, is_keys=is_keys, dim=x.shape[2], codes=pack_codes(codes, fmt.bits), params=params)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The tokens `[P, 64, dim]`."""
        if self.fmt.codebook is not None:
            book = CODEBOOKS[self.fmt.codebook]
            if self.is_keys:
                codes = unpack_codes(self.codes, self.dim, PAGE_TOKENS, self.fmt.bits).transpose(1, 2)
                return dequantize_tokens(codes, self.params, book, self.fmt.key_group, dtype)
            codes = unpack_codes(self.codes, PAGE_TOKENS, self.dim, self.fmt.bits)
            return dequantize_tokens(codes, self.params, book, self.fmt.value_group, dtype)
        if self.is_keys:
            codes = unpack_codes(self.codes, self.dim, PAGE_TOKENS, self.fmt.bits)
            return dequantize_groups(codes, self.params, group=self.fmt.key_group, dtype=dtype).transpose(1, 2)
        codes = unpack_codes(self.codes, PAGE_TOKENS, self.dim, self.fmt.bits)
        return dequantize_groups(codes, self.params, group=self.fmt.value_group, dtype=dtype)

    def tiles(self, num_heads: int, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tokens `[num_heads, m, dim]` of heads with as many pages each, `num_tokens` or a page of each at a time."""
        order = torch.arange(len(self.codes), device=self.codes.device).view(num_heads, -1)
        for part in order.split(max(1, num_tokens // PAGE_TOKENS), dim=1):
            yield self[part.flatten()].decode(dtype).unflatten(0, part.shape).flatten(1, 2)

    def products(self, q: Tensor) -> Tensor:
        """Products `[M, P * 64]` of q `[M, dim]` and keys."""
        if self.fmt.codebook is None:
            return row_products(q, self._matrices)
        return torch.cat([q[:, :0], *(q @ block.T for block in self._blocks(q.dtype))], dim=1)

    def mix(self, weights: Tensor) -> Tensor:
        """Sums `[M, dim]` of values with weights `[M, P * 64]`."""
        if self.fmt.codebook is None:
            return column_products(weights, self._matrices)
        parts = zip(weights.split(BLOCK * PAGE_TOKENS, dim=1), self._blocks(weights.dtype), strict=False)
        return sum((w @ block for w, block in parts), start=weights.new_zeros(len(weights), self.dim))

    @property
    def _matrices(self) -> Matrices:
        """Pages of whole numbers as packed matrices, `[dim, 64]` of keys and `[64, dim]` of values."""
        rows, columns = (self.dim, PAGE_TOKENS) if self.is_keys else (PAGE_TOKENS, self.dim)
        group = self.fmt.key_group if self.is_keys else self.fmt.value_group
        return Matrices(
            codes=self.codes, params=self.params, rows=rows, columns=columns, bits=self.fmt.bits,
            group=min(group, columns),
        )  # fmt: skip

    def _blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tokens `[m, dim]` of some pages at a time."""
        for first in range(0, len(self.codes), BLOCK):
            yield self[first : first + BLOCK].decode(dtype).flatten(0, 1)

    def __getitem__(self, pages: slice | Tensor) -> PageSide:
        return replace(self, codes=self.codes[pages], params=self.params[pages])

    def followed_by(self, later: PageSide) -> PageSide:
        """The pages of both."""
        codes, params = torch.cat([self.codes, later.codes]), torch.cat([self.params, later.params])
        return replace(self, codes=codes, params=params)
