"""Encoding of pages by the native library, on CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.kernels import native
from steno.types import PAGE_TOKENS, PageFormat

from .packing import code_bytes

if TYPE_CHECKING:
    from .matrices import Matrices

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`Format` of csrc/attend.h."""


class _EncodeProblem(ctypes.Structure):
    """`struct EncodeProblem` of csrc/encode.h; pairs are keys, values."""

    _fields_ = [
        ("inputs", ctypes.c_void_p * 2),
        ("offsets", ctypes.c_void_p * 2),
        ("codes", ctypes.c_void_p * 2),
        ("params", ctypes.c_void_p * 2),
        ("token_strides", ctypes.c_int64 * 2),
        ("groups", ctypes.c_int64 * 2),
        ("format", ctypes.c_int64),
        ("num_pages", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class _MatrixProblem(ctypes.Structure):
    """`struct MatrixProblem` of csrc/attend.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("format", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("by_column", ctypes.c_int64),
        ("num_matrices", ctypes.c_int64),
        ("num_vectors", ctypes.c_int64),
        ("x_step", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_step", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("isa", ctypes.c_int32),
    ]


def is_there() -> bool:
    """Whether the library is."""
    return native.why_missing() is None


def multiply(
    x: Tensor, out: Tensor, matrices: Matrices, levels: Tensor | None, *, x_step: int, out_step: int,
    isa: str | None = None,
) -> None:  # fmt: skip
    """Adds to out `[M, ...]` the products of x `[M, ...]` and packed matrices, both fp32 and contiguous.

    Matrix i reads x from number `i * x_step` of each line on, and adds to out from `i * out_step` on. One thread.
    """
    problem = _MatrixProblem(
        x=x.data_ptr(),
        out=out.data_ptr(),
        codes=matrices.codes.data_ptr(),
        params=None if matrices.params is None else matrices.params.data_ptr(),
        levels=None if levels is None else levels.data_ptr(),
        format=matrices.native_format,
        rows=matrices.rows,
        columns=matrices.columns,
        group=matrices.group,
        by_column=matrices.by_column,
        num_matrices=matrices.num_matrices,
        num_vectors=len(x),
        x_step=x_step,
        x_stride=x.stride(0),
        out_step=out_step,
        out_stride=out.stride(0),
        isa=native.number_of_isa(isa),
    )
    if matrices.num_matrices and len(x):
        native.check_status(native.library().steno_multiply(ctypes.byref(problem)), isa)


def can_run(keys: Tensor, values: Tensor) -> bool:
    """Whether the library is there and takes these tensors."""
    return _fits(keys, values) and native.why_missing() is None


def _fits(keys: Tensor, values: Tensor) -> bool:
    return keys.dtype == values.dtype and keys.dtype in FORMATS and keys.device.type == values.device.type == "cpu"


def encode_pages(
    keys: Tensor, values: Tensor, fmt: PageFormat, *, isa: str | None = None, num_threads: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `Pages` for keys and values `[..., 64, D]`, read where they lie; to the bit those of plain torch.

    isa, num_threads: as in `steno.kernels.attention.attend`. Raises `KernelError` where the library or `isa` is missing.
    """
    if not _fits(keys, values):
        got = " and ".join(f"{x.dtype} on {x.device}" for x in (keys, values))
        raise BadArgument(
            f"the native encoder takes keys and values of one dtype, fp32, bf16 or fp16, on cpu; got {got}."
        )
    head_dim = keys.shape[-1]
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values)]
    offsets = [page_offsets(x.shape[:-2], x.stride()) for x in inputs]
    shapes = ((head_dim, PAGE_TOKENS, fmt.key_group), (PAGE_TOKENS, head_dim, min(fmt.value_group, head_dim)))
    num_pages = len(offsets[0])
    codes = [
        torch.empty(num_pages, code_bytes(rows, columns, fmt.bits), dtype=torch.uint8) for rows, columns, _ in shapes
    ]
    params = [
        torch.empty(num_pages, 2, -(-columns // group), rows, dtype=torch.float16) for rows, columns, group in shapes
    ]
    problem = _EncodeProblem(
        inputs=_pointers(inputs),
        offsets=_pointers(offsets),
        codes=_pointers(codes),
        params=_pointers(params),
        token_strides=(ctypes.c_int64 * 2)(*(x.stride(-2) for x in inputs)),
        groups=(ctypes.c_int64 * 2)(*(group for _, _, group in shapes)),
        format=FORMATS[keys.dtype],
        num_pages=num_pages,
        head_dim=head_dim,
        bits=fmt.bits,
        isa=native.number_of_isa(isa),
        num_threads=num_threads or torch.get_num_threads(),
    )
    if num_pages:
        native.check_status(native.library().steno_encode_pages(ctypes.byref(problem)), isa)
    return codes[0], codes[1], params[0], params[1]


def page_offsets(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """How many numbers behind the first one each page of a tensor begins, in the order of its leading axes: int64."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(shape, strides, strict=False):
        offsets = (offsets[:, None] + torch.arange(size) * stride).reshape(-1)
    return offsets


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * 2)(*(x.data_ptr() for x in tensors))
