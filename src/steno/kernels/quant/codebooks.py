"""Codebooks: codes that stand for levels, with one scale per group and no minimum.

A group is some channels of one token, of its key as of its value. Codes are unsigned; code i stands for `levels[i]` times
the scale of its group. Scales are fp16; or, where `byte_scales` is set, E4M3 with one fp32 number per page that all of
them are multiplied by.

Source: OCP 8-bit Floating Point Specification (FP8), 2023; OCP Microscaling Formats, 2023 (E2M1); the NVFP4 recipe of
    NVIDIA's Transformer Engine; block formats q8_0 and q4_0 of llama.cpp (`ggml-common.h`); Lloyd and Max's quantizer of
    the normal distribution: Zandieh, Daliri, Hadian, Mirrokni, TurboQuant, 2025, https://arxiv.org/abs/2504.19874.
Differs: codes lie in the lines of packing.py, not in blocks with their scale; E5M2's largest level is used for no more
    than a guard: scales bring groups to 448, as for E4M3, where fp16 still holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from .groups import as_half

E4M3_MAX = 448.0
E2M1_MAX = 6.0
BOOK = 64
"""`kBook` of csrc/attend.h, which names the other formats too."""
BYTE_SCALES = 256

Quantized = tuple[Tensor, Tensor, Tensor | None]
"""Codes uint8, the shape of the groups `[P, ..., n]`; scales, fp32 numbers that can be stored, `[P, ..., 1]`; and, for
`byte_scales`, what the scales of each page are multiplied by, fp32 `[P]`."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """levels: `[2**bits]` fp32; quantize: groups `[P, ..., n]` fp32 to `Quantized`, of pages P that may share a number."""

    bits: int
    levels: tuple[float, ...]
    quantize: Callable[[Tensor], Quantized]
    native_format: int
    byte_scales: bool = False
    whole_token: bool = False
    """Whether a group must be a whole token."""


def nearest_levels(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the level nearest to each x; levels ascend, and a tie goes to the even index."""
    middles = (levels[1:] + levels[:-1]) / 2
    # a tie stays at the lower index; a middle behind an odd one lies a little lower, so that a tie is beyond it
    middles[1::2] = torch.nextafter(middles[1::2], middles.new_tensor(-torch.inf))
    return torch.bucketize(x.contiguous(), middles)


def _peak(groups: Tensor) -> Tensor:
    return groups.abs().amax(-1, keepdim=True)


def _inverse(scales: Tensor) -> Tensor:
    """One over each scale, 0 over 0."""
    return torch.where(scales == 0, 0.0, scales.reciprocal())


def _quantize_float8(groups: Tensor, dtype: torch.dtype) -> Quantized:
    scales = as_half(_peak(groups) / E4M3_MAX)
    scaled = (groups * _inverse(scales)).clamp(-E4M3_MAX, E4M3_MAX).nan_to_num_(0.0)
    return scaled.to(dtype).view(torch.uint8), scales, None


def _quantize_q8_0(groups: Tensor) -> Quantized:
    """The scale is that of the largest magnitude, 127; codes come from the scale before it is rounded, as in llama.cpp."""
    scales = _peak(groups) / 127
    x = groups * _inverse(scales)
    whole = torch.where(x < 0, (x - 0.5).ceil(), (x + 0.5).floor())  # halves away from zero
    return (whole.nan_to_num_(0.0).clamp_(-127, 127) + 128).to(torch.uint8), as_half(scales), None


def _quantize_q4_0(groups: Tensor) -> Quantized:
    """The element of the largest magnitude, with its sign, is -8 scales."""
    scales = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    codes = (groups * _inverse(scales) + 8.5).floor().nan_to_num_(8.0).clamp_(0, 15)
    return codes.to(torch.uint8), as_half(scales), None


E2M1_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1_codes(x: Tensor) -> Tensor:
    """Sign and index of the nearest E2M1 number, ties to even, beyond 6 the largest: 4 bits."""
    index = nearest_levels(x.abs(), x.new_tensor(E2M1_HALF))
    return (index + 8 * x.signbit()).to(torch.uint8)


def _quantize_nvfp4(groups: Tensor) -> Quantized:
    peaks = _peak(groups)  # [P, ..., 1]
    pages = peaks.flatten(1).amax(1) / (E2M1_MAX * E4M3_MAX)  # [P]
    page = pages.view(-1, *[1] * (groups.ndim - 1))
    scales = (peaks / E2M1_MAX * _inverse(page)).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    return e2m1_codes((groups * _inverse(scales * page)).nan_to_num_(0.0)), scales, pages


@lru_cache(maxsize=8)
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The levels of the quantizer of N(0, 1) with the least squared error, ascending: each the mean of its cell."""
    count = 2**bits
    levels = torch.erfinv((torch.arange(count, dtype=torch.float64) + 0.5) / count * 2 - 1) * sqrt(2)
    for _ in range(5000):
        edges = torch.cat(
            [levels.new_tensor([-torch.inf]), (levels[1:] + levels[:-1]) / 2, levels.new_tensor([torch.inf])]
        )
        density = (-edges.square() / 2).exp() / sqrt(2 * torch.pi)
        mass = torch.special.ndtr(edges).diff()
        means = -density.diff() / mass
        if (means - levels).abs().max() < 1e-12:
            break
        levels = means
    levels = (levels - levels.flip(0)) / 2  # symmetric to the last bit
    return tuple(levels.tolist())


def _quantize_normal(groups: Tensor, bits: int, correct_norm: bool) -> Quantized:
    """A vector of length n is quantized as its length times a unit vector, whose numbers are like N(0, 1 / n)."""
    levels = groups.new_tensor(lloyd_max(bits))
    norms = torch.linalg.vector_norm(groups, dim=-1, keepdim=True)
    root = sqrt(groups.shape[-1])
    codes = nearest_levels((groups * (root * _inverse(norms))).nan_to_num_(0.0), levels)
    length = torch.linalg.vector_norm(levels[codes], dim=-1, keepdim=True) if correct_norm else root
    return codes.to(torch.uint8), as_half(norms / length), None


def _float8_levels(dtype: torch.dtype) -> tuple[float, ...]:
    """What each byte stands for; the codes of NaN and infinity, which are never written, count as 0."""
    return tuple(torch.arange(256, dtype=torch.uint8).view(dtype).float().nan_to_num(0.0, 0.0, 0.0).tolist())


def _normal(bits: int, correct_norm: bool) -> Codebook:
    return Codebook(
        bits, lloyd_max(bits), lambda x: _quantize_normal(x, bits, correct_norm), BOOK + bits, whole_token=True
    )


CODEBOOKS = {
    "e4m3": Codebook(
        8, _float8_levels(torch.float8_e4m3fn), lambda x: _quantize_float8(x, torch.float8_e4m3fn), BOOK + 16 + 8
    ),
    "e5m2": Codebook(
        8, _float8_levels(torch.float8_e5m2), lambda x: _quantize_float8(x, torch.float8_e5m2), BOOK + 32 + 8
    ),
    "q8_0": Codebook(8, tuple(float(i - 128) for i in range(256)), _quantize_q8_0, BOOK + 8),
    "q4_0": Codebook(4, tuple(float(i - 8) for i in range(16)), _quantize_q4_0, BOOK + 4),
    "nvfp4": Codebook(
        4, (*E2M1_HALF, *(-x for x in E2M1_HALF)), _quantize_nvfp4, BYTE_SCALES + BOOK + 4, byte_scales=True
    ),
    **{f"normal{bits}": _normal(bits, False) for bits in (1, 2, 4)},
    **{f"normal{bits}_nc": _normal(bits, True) for bits in (1, 2, 4)},
}
"""By the name that a `PageFormat` gives."""


def quantize_tokens(tokens: Tensor, book: Codebook, group: int) -> tuple[Tensor, Tensor]:
    """Codes `[P, 64, D]` uint8 and params of tokens `[P, 64, D]`, `group` channels of which share a scale.

    Params are fp16 `[P, groups, 64]`, or, with byte scales, bytes `[P, 4 + groups * 64]`: one fp32 number, then E4M3.
    """
    num_pages, num_tokens, dim = tokens.shape
    group = min(group, dim)
    largest = torch.finfo(torch.float32).max
    padded = pad(tokens.float().clamp(-largest, largest), (0, -dim % group))
    codes, scales, page = book.quantize(padded.reshape(num_pages, num_tokens, -1, group))
    codes, scales = codes.flatten(2)[:, :, :dim], scales.squeeze(3).transpose(1, 2)  # [P, groups, 64]
    if page is None:
        return codes, scales.half().contiguous()
    scale_bytes = scales.to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    return codes, torch.cat([page[:, None].view(torch.uint8), scale_bytes], dim=1)


def dequantize_tokens(codes: Tensor, params: Tensor, book: Codebook, group: int, dtype: torch.dtype) -> Tensor:
    """The tokens `[P, 64, D]` that codes `[P, 64, D]` and params of `quantize_tokens` stand for, computed in fp32."""
    num_pages, num_tokens, dim = codes.shape
    if book.byte_scales:
        scales = params[:, 4:].contiguous().view(torch.float8_e4m3fn).float().view(num_pages, -1, num_tokens)
        scales = scales * params[:, :4].contiguous().view(torch.float32)[:, :, None]
    else:
        scales = params.float()
    levels = torch.tensor(book.levels, dtype=torch.float32, device=codes.device)
    scales = scales.transpose(1, 2).repeat_interleave(min(group, dim), dim=2)[:, :, :dim]  # [P, 64, D]
    return (levels[codes.long()] * scales).to(dtype)


def param_bytes(book: Codebook, group: int, num_tokens: int, head_dim: int) -> int:
    """Bytes of the params of one page."""
    scales = -(-head_dim // group) * num_tokens
    return 4 + scales if book.byte_scales else scales * torch.float16.itemsize


@lru_cache(maxsize=64)
def level_table(name: str) -> Tensor:
    """The levels of a codebook of at most 16, repeated to `[16]` fp32, as native code looks them up; kept for good."""
    levels = CODEBOOKS[name].levels
    return torch.tensor(levels * (16 // len(levels)), dtype=torch.float32)
