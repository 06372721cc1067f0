"""Attention by the native library, on CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.kernels.native import check_status, library, number_of_isa

from .table import SpanTable

QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Problem(ctypes.Structure):
    """`struct Problem` of csrc/attend.h."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("num_queries", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


def attend(
    q: Tensor,
    table: SpanTable,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    isa: str | None = None,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Like `naive.attend`, for CPU tensors; raises `KernelError` where the library or `isa` is missing."""
    isa_number = number_of_isa(isa)
    if q.device.type != "cpu" or q.dtype not in QUERY_DTYPES:
        raise BadArgument(f"the native kernel takes fp32, bf16 or fp16 queries on cpu; got {q.dtype} on {q.device}.")
    queries = q.to(torch.float32).contiguous()
    out = torch.empty_like(queries)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    num_heads = table.num_rows * table.num_kv_heads
    problem = _Problem(
        q=queries.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        entries=table.entries.data_ptr(),
        offsets=table.offsets.data_ptr(),
        num_heads=num_heads,
        group=q.shape[0] * q.shape[1] // num_heads,
        num_queries=q.shape[2],
        head_dim=q.shape[3],
        scale=scale,
        softcap=softcap or 0.0,
        causal=causal,
        isa=isa_number,
        num_threads=num_threads or torch.get_num_threads(),
    )
    check_status(library().steno_attend(ctypes.byref(problem)), isa)
    return out.to(q.dtype), lse
