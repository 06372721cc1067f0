"""Asymmetric quantization of groups: unsigned codes with an fp16 scale and minimum per group.

Source: Liu et al., KIVI, ICML 2024, https://arxiv.org/abs/2402.02750, section 3.
Differs: the codes are computed with the scale and minimum as stored, and the scale spans from the stored minimum to the
maximum, so rounding them to fp16 costs at most one fp16 step at the ends of the range; a floor on the scale keeps
constant groups finite.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

FP16_MAX = 65504.0
MIN_SCALE = 1e-5
"""Floor of a scale; fp16 still holds it to 0.3 %."""


def as_half(x: Tensor) -> Tensor:
    """The fp32 numbers nearest to x that fp16 holds."""
    return x.clamp(-FP16_MAX, FP16_MAX).half().float()


def quantize_groups(matrix: Tensor, *, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Quantize matrices along their columns.

    Parameters
    ----------
    matrix: `[P, R, C]`, any float dtype.
    group: columns that share a scale; the last group may be partial.

    Returns
    -------
    codes `[P, R, C]` uint8, and params `[P, 2, groups, R]` fp16: scales, then minima.
    """
    num_pages, rows, columns = matrix.shape
    group = min(group, columns)
    grouped = matrix.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # changed in place below
    if columns % group:
        # repeating the last column changes neither the minimum nor the maximum of the last group
        grouped = torch.cat([grouped, grouped[:, :, -1:].expand(-1, -1, -columns % group)], dim=2)
    grouped = grouped.reshape(num_pages, rows, -1, group)
    low, high = grouped.amin(dim=3, keepdim=True), grouped.amax(dim=3, keepdim=True)  # [P, R, groups, 1]
    minima = low.clamp_(-FP16_MAX, FP16_MAX).add_(0.0).half()  # one zero, whichever of the two was found first
    scales = ((high - minima.float()) / (2**bits - 1)).clamp_(MIN_SCALE, FP16_MAX).half()
    codes = (
        grouped.sub_(minima.float()).mul_(scales.float().reciprocal_()).round_().clamp_(0, 2**bits - 1).nan_to_num_(0.0)
    )
    params = torch.stack([scales.squeeze(3), minima.squeeze(3)], dim=1)  # [P, 2, R, groups]
    codes = codes.to(torch.uint8).reshape(num_pages, rows, -1)[:, :, :columns]
    return codes, params.transpose(2, 3).contiguous()


def dequantize_groups(codes: Tensor, params: Tensor, *, group: int, dtype: torch.dtype) -> Tensor:
    """The matrices `[P, R, C]` that codes `[P, R, C]` and params `[P, 2, groups, R]` stand for, computed in fp32."""
    num_pages, rows, columns = codes.shape
    group = min(group, columns)
    padded = pad(codes, (0, -columns % group)).reshape(num_pages, rows, -1, group)
    scales, minima = params.float().transpose(2, 3).unsqueeze(4).unbind(1)  # [P, R, groups, 1]
    return torch.addcmul(minima, padded.float(), scales).reshape(num_pages, rows, -1)[:, :, :columns].to(dtype)
