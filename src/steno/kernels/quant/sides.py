"""One side of a page by itself: keys or values alone, for pages whose keys and values differ in width. Plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.types import PAGE_TOKENS, PageFormat

from .codebooks import CODEBOOKS, dequantize_tokens, quantize_tokens
from .groups import dequantize_groups, quantize_groups
from .packing import pack_codes, unpack_codes


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

    def __getitem__(self, pages: slice | Tensor) -> PageSide:
        return replace(self, codes=self.codes[pages], params=self.params[pages])

    def followed_by(self, later: PageSide) -> PageSide:
        """The pages of both."""
        codes, params = torch.cat([self.codes, later.codes]), torch.cat([self.params, later.params])
        return replace(self, codes=codes, params=params)
