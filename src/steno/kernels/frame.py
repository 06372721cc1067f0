"""Values of some heads as whole numbers in a basis, and back, in one pass over the tokens (csrc/frame.cpp).

For processors with AVX-512 for bfloat16 and bytes alone; steno/codec/transform.py does the same in torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.kernels import native

LANES = 16
Angles = Sequence[tuple[Tensor, Tensor]]
"""Of each head cosines and sines fp32 `[n, R / 2]`, by which channels i and i + R / 2 are turned; empty: none is."""


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("heads", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("mean", "matrix", "numbers")),
        *((name, ctypes.c_int64) for name in ("tokens", "num_heads", "head_dim", "half", "is_bfloat")),
        ("scale", ctypes.c_float),
    )


def can_fuse(heads: Sequence[Tensor]) -> bool:
    """Whether `decode` and `encode` run here, on values `[n, D]` like these."""
    first = heads[0]
    return (
        _runs(native.LIBRARY_DIR)
        and first.device.type == "cpu"
        and first.dtype in (torch.bfloat16, torch.float32)
        and first.shape[1] % LANES == 0
        and all(x.is_contiguous() for x in heads)
    )


@lru_cache(maxsize=4)
def _runs(folder: object) -> bool:
    return native.why_missing() is None and bool(native.library().steno_frame_runs())


def decode(
    numbers: Tensor, basis: Tensor, scale: float, mean: Tensor, heads: Sequence[Tensor], angles: Angles = ()
) -> None:
    """Writes `(numbers @ basis) * scale + mean`, turned, into heads `[n, D]`.

    numbers: int8 `[n, C]`; basis: int8 `[C, C]`; mean: fp32 `[C]`, all contiguous, C the channels of all heads. Where
    `can_fuse(heads)`; raises `BadArgument` for tensors that do not fit.
    """
    _check(numbers, basis, torch.int8, mean, heads, angles)
    status = native.library().steno_frame_decode(_problem(numbers, basis, scale, mean, heads, angles))
    if status:
        raise MemoryError("no memory for the scratch of a native kernel.")


def encode(
    heads: Sequence[Tensor], inverse: Tensor, bias: float, mean: Tensor, numbers: Tensor, angles: Angles = ()
) -> int:
    """Writes values `[n, D]`, turned back and without their mean, times `inverse` as whole numbers, -127 .. 127; the largest.

    bias: what is added to the size of a product before what is behind the point is cut off. inverse: bfloat16 `[C, C]`,
    others as in `decode`.
    """
    _check(numbers, inverse, torch.bfloat16, mean, heads, angles)
    largest: int = native.library().steno_frame_encode(_problem(numbers, inverse, bias, mean, heads, angles))
    if largest < 0:
        raise MemoryError("no memory for the scratch of a native kernel.")
    return largest


def _check(
    numbers: Tensor, matrix: Tensor, dtype: torch.dtype, mean: Tensor, heads: Sequence[Tensor], angles: Angles
) -> None:
    """Raises BadArgument unless all have the shapes, types and memory that the native code counts on."""
    num_tokens, dim = heads[0].shape
    channels = len(heads) * dim
    half = angles[0][0].shape[1] if angles else 0
    wanted = [
        ("numbers", numbers, torch.int8, (num_tokens, channels)),
        ("matrix", matrix, dtype, (channels, channels)),
        ("mean", mean, torch.float32, (channels,)),
        *(("heads", x, heads[0].dtype, (num_tokens, dim)) for x in heads),
        *(("angles", x, torch.float32, (num_tokens, half)) for pair in angles for x in pair),
    ]
    for name, x, kind, shape in wanted:
        if x.dtype != kind or x.shape != shape or not x.is_contiguous():
            raise BadArgument(
                f"`{name}` must be {kind} {[*shape]}, contiguous; got {x.dtype} {[*x.shape]} with strides {x.stride()}."
            )
    if not can_fuse(heads) or len(angles) not in (0, len(heads)) or 2 * half > dim:
        raise BadArgument(f"{len(heads)} heads of {dim} channels and {len(angles)} pairs of angles do not fit here.")


def _problem(
    numbers: Tensor, matrix: Tensor, scale: float, mean: Tensor, heads: Sequence[Tensor], angles: Angles
) -> object:
    """The arguments of both functions; the tensors must stay alive meanwhile."""
    half = angles[0][0].shape[1] if angles else 0
    lists = (heads, [cos for cos, _ in angles], [sin for _, sin in angles])
    places = [(ctypes.c_void_p * len(x))(*(t.data_ptr() for t in x)) for x in lists]
    return ctypes.byref(
        _Problem(
            heads=places[0],
            cos=places[1],
            sin=places[2],
            mean=mean.data_ptr(),
            matrix=matrix.data_ptr(),
            numbers=numbers.data_ptr(),
            tokens=len(heads[0]),
            num_heads=len(heads),
            head_dim=heads[0].shape[1],
            half=half,
            is_bfloat=heads[0].dtype == torch.bfloat16,
            scale=scale,
        )
    )
