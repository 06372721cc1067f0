"""TurboQuant: after a random rotation all coordinates of a vector are alike, so one codebook fits all, with one number a token.

Source: Zandieh, Daliri, Hadian, Mirrokni, 2025, https://arxiv.org/abs/2504.19874, section 3.1 (the MSE variant): x = n u,
    y = R u with R orthogonal and random, each y_j to the nearest level of the Lloyd-Max quantizer of N(0, 1 / D).
Differs: the MSE variant alone: the sign sketch of the residual (PROD) makes inner products unbiased at several times their
    variance, which softmax does not forgive. No split into outlier and other channels, whose arithmetic the paper leaves
    open; 4, 2 or 1 bits, as 3 do not fill bytes. `norm_correction` divides by the length of what was decoded, as vLLM does.
    Keys are taken post-RoPE. The rotation is one for all heads and layers: QR of a seeded Gaussian matrix in fp64.
Cost: a product with a [D, D] matrix per token when its page closes, and per query and step; bits + 16 / D bits a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.segment import DenseSegment, HeadKV, PagedSegment, Segment
from steno.kernels.quant import page_bytes
from steno.methods.checks import require_bool, require_choice
from steno.types import PAGE_TOKENS, KeptTokens, Need, PageFormat

WHOLE_TOKEN = 1 << 16
"""A group of channels that is the whole token, whatever its head dimension."""


@lru_cache(maxsize=8)
def rotation(head_dim: int) -> Tensor:
    """A random orthogonal matrix `[D, D]` fp32 on the CPU, always the same."""
    gaussian = torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(2504), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()  # QR leaves the signs open


def rotate(x: Tensor, *, back: bool = False) -> Tensor:
    """Vectors `[..., D]` rotated, or rotated back, in fp32, or in fp64 for fp64."""
    matrix = rotation(x.shape[-1]).to(x.device)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x @ (matrix if back else matrix.T).to(x.dtype)


@final
@dataclass(frozen=True, kw_only=True)
class RotatedSegment(Segment):
    """Pages of rotated keys and values."""

    inner: PagedSegment

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.inner.lengths

    @property
    def log_counts(self) -> list[Tensor] | None:
        return self.inner.log_counts

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        heads = self.inner.decode(torch.float32)
        return [(rotate(k, back=True).to(dtype), rotate(v, back=True).to(dtype)) for k, v in heads]

    def key_tiles(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        for keys in self.inner.key_tiles(num_tokens, torch.float32):
            yield rotate(keys, back=True).to(dtype)

    def products(self, q: Tensor) -> list[Tensor]:
        return self.inner.products(rotate(q))

    def mix(self, weights: Sequence[Tensor]) -> Tensor:
        return rotate(self.inner.mix(weights), back=True)

    def attend(self, q: Tensor, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        out, lse = self.inner.attend(rotate(q), scale, softcap)
        return rotate(out, back=True).to(q.dtype), lse

    def prefix(self, lengths: Sequence[int], dtype: torch.dtype) -> list[Segment]:
        parts: list[Segment] = []
        for part in self.inner.prefix(lengths, torch.float32):
            if isinstance(part, PagedSegment):
                parts.append(RotatedSegment(inner=part))
            else:
                heads = [
                    (rotate(k, back=True).to(dtype), rotate(v, back=True).to(dtype)) for k, v in part.decode(dtype)
                ]
                parts.append(DenseSegment.of(heads, log_counts=part.log_counts))
        return parts

    def joined(self, later: Segment) -> Segment | None:
        inner = self.inner.joined(later.inner) if isinstance(later, RotatedSegment) else None
        return RotatedSegment(inner=inner) if isinstance(inner, PagedSegment) else None


@final
@dataclass(frozen=True, kw_only=True)
class TurboQuant:
    """Pages of rotated tokens, coded by the levels of a normal distribution.

    Parameters
    ----------
    bits : int, default 4 bits
        4, 2 or 1, of keys and values.
    norm_correction : bool, default False
        Give decoded vectors the length of the original ones, which keeps inner products larger at a little more error.

    Raises
    ------
    BadArgument
        If a value is none of these.
    """

    id: ClassVar[str] = "turboquant"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "TurboQuant"
    paper: ClassVar[str] = "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2504.19874"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The MSE variant alone, without the sign sketch of the residual and without a split into outlier channels; 4, 2 or 1 "
        "bits; keys are rotated post-RoPE."
    )

    bits: int = 4
    norm_correction: bool = False

    def __post_init__(self) -> None:
        require_choice("bits", self.bits, (4, 2, 1))
        require_bool("norm_correction", self.norm_correction)

    page_format: ClassVar[None] = None

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS

    @property
    def chunk_tokens(self) -> int:
        return PAGE_TOKENS

    @property
    def format(self) -> PageFormat:
        """Of the pages of rotated tokens."""
        name = f"normal{self.bits}" + ("_nc" if self.norm_correction else "")
        return PageFormat(bits=self.bits, key_group=WHOLE_TOKEN, value_group=WHOLE_TOKEN, codebook=name)

    def encode(self, tokens: KeptTokens) -> Segment:
        """Pages of these tokens, rotated."""
        heads = [(rotate(k), rotate(v)) for k, v in zip(tokens.keys, tokens.values, strict=True)]
        return RotatedSegment(inner=PagedSegment.encode(heads, self.format, log_counts=tokens.log_counts))

    def bytes_bound(self, num_tokens: int, *, num_kv_heads: int, head_dim: int) -> int | None:
        """All bytes of the pages; heads of unlike lengths have no more of them."""
        return -(-num_tokens // PAGE_TOKENS) * num_kv_heads * page_bytes(self.format, head_dim)
