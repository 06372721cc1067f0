"""Attention by the native library, on CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.kernels.native import check_status, library, number_of_isa

from .table import Append, SpanTable

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
        ("num_kv_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("num_queries", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class _NewTokens(ctypes.Structure):
    """`struct NewTokens` of csrc/attend.h."""

    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("key_strides", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 3),
        ("number_bytes", ctypes.c_int64),
    ]


def attend(
    q: Tensor,
    table: SpanTable,
    *,
    append: Append | None = None,
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
    new, lengths, _alive = _NewTokens(), None, None
    if append is not None:
        lengths, _alive = _describe(append, table, new)
    problem = _Problem(
        q=queries.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        entries=table.entries.data_ptr(),
        offsets=table.offsets.data_ptr(),
        num_heads=num_heads,
        num_kv_heads=table.num_kv_heads,
        group=q.shape[0] * q.shape[1] // num_heads,
        num_queries=q.shape[2],
        head_dim=q.shape[3],
        scale=scale,
        softcap=softcap or 0.0,
        causal=causal,
        isa=isa_number,
        num_threads=num_threads or torch.get_num_threads(),
    )
    check_status(library().steno_attend(ctypes.byref(problem), ctypes.byref(new)), isa)
    if lengths is not None:
        table.tail_lengths = lengths
        table.version += 1
    return out.to(q.dtype), lse


def _describe(append: Append, table: SpanTable, new: _NewTokens) -> tuple[list[int], Tensor | None]:
    """Fills in `new`; returns the lengths of the tails afterwards, and what must stay alive until then."""
    keys, values, counts = append
    lengths = table.check_append(keys, counts)
    assert table.tail is not None
    dtype = table.tail[0].dtype
    if values.shape != keys.shape or any(x.dtype != dtype or x.stride(3) != 1 for x in (keys, values)):
        raise BadArgument(
            f"new keys and values must be alike, {dtype}, with the numbers of a head side by side; got {keys.dtype} "
            f"{[*keys.shape]} {keys.stride()}, {values.dtype} {[*values.shape]} {values.stride()}."
        )
    numbers = None if counts is None else torch.tensor(counts, dtype=torch.int64)
    new.keys, new.values = keys.data_ptr(), values.data_ptr()
    new.counts = None if numbers is None else numbers.data_ptr()
    new.key_strides[:], new.value_strides[:] = keys.stride()[:3], values.stride()[:3]
    new.number_bytes = dtype.itemsize
    return lengths, numbers
