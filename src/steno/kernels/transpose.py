"""Matrices of bytes transposed: rows of tokens as symbols of channels, and back (csrc/bytes.cpp)."""

from __future__ import annotations

import ctypes

import numpy as np

from steno.errors import BadArgument
from steno.kernels import native


def transposed(rows: np.ndarray) -> np.ndarray:
    """uint8 `[C, n]`, contiguous, of uint8 `[n, C]`; raises `BadArgument` for anything else."""
    if rows.dtype != np.uint8 or rows.ndim != 2:
        raise BadArgument(f"a matrix of bytes must be uint8 [n, C]; got {rows.dtype} {[*rows.shape]}.")
    if native.why_missing() is not None:
        return np.ascontiguousarray(rows.T)
    rows = np.ascontiguousarray(rows)
    out = np.empty(rows.shape[::-1], np.uint8)
    native.library().steno_transpose_bytes(
        native.address(rows), ctypes.c_int64(rows.shape[0]), ctypes.c_int64(rows.shape[1]), native.address(out)
    )
    return out
