"""Spans: runs of tokens of one KV head, dense or in quantized pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.kernels.quant import Pages, decode_pages
from steno.types import PAGE_TOKENS

DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DenseSpan:
    """Tokens as they are: keys, values `[n, D]` fp32, bf16 or fp16, contiguous.

    log_counts: `[n]` fp32 added to the logits, the log of how many tokens each entry stands for; None means one each.
    """

    keys: Tensor
    values: Tensor
    log_counts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.keys.ndim != 2 or self.keys.shape != self.values.shape or self.keys.dtype != self.values.dtype:
            raise BadArgument(
                "keys and values of a span must both be [n, D] of one dtype; "
                f"got {[*self.keys.shape]} {self.keys.dtype}, {[*self.values.shape]} {self.values.dtype}."
            )
        if self.keys.dtype not in DENSE_DTYPES:
            raise BadArgument(f"a dense span holds fp32, bf16 or fp16; got {self.keys.dtype}.")
        _check_layout(self.keys, self.values, log_counts=self.log_counts, num_tokens=self.num_tokens)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that the span refers to."""
        return tuple(x for x in (self.keys, self.values, self.log_counts) if x is not None)

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[0]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[1]

    def read(self, num_tokens: int, page_ids: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """keys, values `[m, D]` and token indices `[m]` of the first `num_tokens`, or of those in `page_ids`."""
        index = _token_index(num_tokens, page_ids, self.keys.device)
        return *self.take(index, dtype), index

    def take(self, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """keys and values `[m, D]` of the tokens `index` `[m]`."""
        return self.keys[index].to(dtype), self.values[index].to(dtype)


@dataclass(frozen=True)
class PageSpan:
    """P quantized pages of one KV head. log_counts: `[P * 64]` fp32 added to the logits, or None."""

    pages: Pages
    log_counts: Tensor | None = None

    def __post_init__(self) -> None:
        _check_layout(*self.pages.tensors, log_counts=self.log_counts, num_tokens=self.num_tokens)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that the span refers to."""
        return (*self.pages.tensors, *([] if self.log_counts is None else [self.log_counts]))

    @property
    def num_tokens(self) -> int:
        return self.pages.num_pages * PAGE_TOKENS

    @property
    def head_dim(self) -> int:
        return self.pages.head_dim

    def read(self, num_tokens: int, page_ids: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """keys, values `[m, D]` and token indices `[m]` of the first `num_tokens`, or of those in `page_ids`."""
        index = _token_index(num_tokens, page_ids, self.pages.key_codes.device)
        return *self.take(index, dtype), index

    def take(self, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """keys and values `[m, D]` of the tokens `index` `[m]`; decodes the span."""
        keys, values = decode_pages(self.pages, dtype)  # [P, 64, D]
        return keys.flatten(0, 1)[index], values.flatten(0, 1)[index]


Span = DenseSpan | PageSpan


def _token_index(num_tokens: int, page_ids: Tensor | None, device: torch.device) -> Tensor:
    """Indices `[m]` of the tokens to read; of the last, partial page only what is there."""
    if page_ids is None:
        return torch.arange(num_tokens, device=device)
    starts = page_ids.to(device, torch.int64) * PAGE_TOKENS  # [pages]
    index = (starts[:, None] + torch.arange(PAGE_TOKENS, device=device)).flatten()
    return index[index < num_tokens]


def _check_layout(*tensors: Tensor, log_counts: Tensor | None, num_tokens: int) -> None:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise BadArgument("the tensors of a span must be contiguous; got a strided view.")
    if log_counts is None:
        return
    if log_counts.shape != (num_tokens,) or log_counts.dtype != torch.float32 or not log_counts.is_contiguous():
        raise BadArgument(
            f"log_counts must be [{num_tokens}] fp32, contiguous; got {[*log_counts.shape]} {log_counts.dtype}."
        )
