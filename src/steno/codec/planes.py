"""Numbers as planes of bytes, the most predictable first, so that an entropy coder sees like beside like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from steno.errors import BadArgument, nearest

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "uint8": torch.uint8, "int32": torch.int32,
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
})  # fmt: skip
"""What a file can hold, by its name there."""

_BITS: Mapping[str, type[np.unsignedinteger]] = MappingProxyType(
    {"uint8": np.uint8, "int32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
)

_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_SIGNED_NUMPY = {1: np.uint8, 2: np.int16, 4: np.int32}


def num_planes(dtype: str) -> int:
    """Bytes of a number."""
    if dtype not in _BITS:
        raise BadArgument(f"unknown dtype {dtype!r}; {nearest(dtype, _BITS)}")
    return np.dtype(_BITS[dtype]).itemsize


def dtype_name(x: Tensor) -> str:
    """The name of the dtype of `x` in a file; raises `BadArgument` if it has none."""
    name = str(x.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BadArgument(f"a file holds {', '.join(DTYPES)}; got {name}.")
    return name


def split_planes(x: Tensor) -> list[np.ndarray]:
    """The planes of a tensor, uint8 of its shape each.

    bfloat16 and float32: the exponent; the sign and 7 bits of mantissa; what is left. Others: bytes. The highest first.
    """
    name = dtype_name(x)
    width = num_planes(name)
    flat = x.detach().cpu().contiguous()
    bits = flat.view(_SIGNED[width]).numpy().view(_BITS[name])
    shifts = range(8 * (width - 1), -1, -8)
    if width == 1:
        return [bits]
    if name not in ("bfloat16", "float32"):
        return [(bits >> shift).astype(np.uint8) for shift in shifts]
    top = bits >> (8 * width - 16)
    exponent, rest = (top >> 7).astype(np.uint8), (top >> 8 & 0x80 | top & 0x7F).astype(np.uint8)
    return [exponent, rest] + [(bits >> shift).astype(np.uint8) for shift in shifts[2:]]


def join_planes(planes: Sequence[np.ndarray], dtype: str) -> Tensor:
    """The inverse of `split_planes`."""
    kind, width = _BITS[dtype], num_planes(dtype)
    planes = list(planes)
    if width == 1:
        return torch.from_numpy(np.ascontiguousarray(planes[0]))
    if dtype in ("bfloat16", "float32"):
        exponent, rest = planes[0], planes[1]
        planes[:2] = [rest & 0x80 | exponent >> 1, exponent << 7 | rest & 0x7F]
    bits = np.zeros(planes[0].shape, kind)
    for plane in planes:
        bits = bits << 8 | plane
    return torch.from_numpy(bits.astype(kind).view(_SIGNED_NUMPY[width])).view(DTYPES[dtype])
