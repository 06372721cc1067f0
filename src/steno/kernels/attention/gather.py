"""Single tokens of the spans of a table, as dense rows: what is read where tokens are chosen, not pages."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.kernels import native

from .spans import DENSE_DTYPES
from .table import Column, SpanTable

UNKNOWN_FORMAT = 4
"""What the native library answers where it does not know the format of a span."""


@final
@dataclass(frozen=True, kw_only=True)
class Gathered:
    """keys, values: `[m, D]`; values None if only keys were asked for. log_counts: `[m]` fp32, or None if no span has any."""

    keys: Tensor
    values: Tensor | None
    log_counts: Tensor | None


class _GatherProblem(ctypes.Structure):
    """`struct GatherProblem` of csrc/gather.cpp."""

    _fields_ = [
        ("entries", ctypes.c_void_p),
        ("entry_ids", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("log_counts", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("format", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
    ]


def gather_tokens(
    table: SpanTable,
    entry_ids: Tensor,
    token_ids: Tensor,
    *,
    device: torch.device,
    values: bool = True,
    impl: str = "auto",
    num_threads: int | None = None,
) -> Gathered:
    """Copies tokens out of their spans, in the order given.

    Parameters
    ----------
    entry_ids, token_ids: int64 `[m]`: which entry of the table, and which token of it.
    device: where the rows shall lie.
    values: whether values are wanted too.
    impl: `naive` (plain torch, any device, decodes every page span that is touched whole), `cpu` (native, reads just these
        tokens), or `auto`, native where the spans lie in memory of this machine and the library knows their formats.

    Returns
    -------
    Rows in the dtype of the spans where they all share a dense one, otherwise fp32.

    Raises
    ------
    BadArgument: a token outside of its span, an impl that does not exist. KernelError: the library is not there.
    """
    if impl not in ("auto", "cpu", "naive"):
        raise BadArgument(f"`impl` must be auto, cpu or naive; got impl={impl!r}.")
    dtype = _common_dtype(table)
    on_cpu = device.type == "cpu" and entry_ids.device.type == "cpu"
    if impl == "cpu" or (impl == "auto" and on_cpu and native.why_missing() is None):
        found = _gather_natively(table, entry_ids, token_ids, dtype, values, num_threads)
        if found is not None:
            return found
    return _gather(table, entry_ids.cpu(), token_ids.cpu(), dtype, device, values)


def _common_dtype(table: SpanTable) -> torch.dtype:
    formats = table.entries[:, Column.FORMAT]
    first = int(formats[0])
    if first < len(DENSE_DTYPES) and bool((formats == first).all()):
        return DENSE_DTYPES[first]
    return torch.float32


def _gather_natively(
    table: SpanTable, entry_ids: Tensor, token_ids: Tensor, dtype: torch.dtype, values: bool, num_threads: int | None
) -> Gathered | None:
    """None if the library does not know the format of a span."""
    count, dim = len(entry_ids), table.head_dim
    entry_ids, token_ids = entry_ids.contiguous(), token_ids.contiguous()
    found = Gathered(
        keys=torch.empty(count, dim, dtype=dtype),
        values=torch.empty(count, dim, dtype=dtype) if values else None,
        log_counts=torch.empty(count) if _has_log_counts(table) else None,
    )
    problem = _GatherProblem(
        entries=table.entries.data_ptr(),
        entry_ids=entry_ids.data_ptr(),
        token_ids=token_ids.data_ptr(),
        keys=found.keys.data_ptr(),
        values=None if found.values is None else found.values.data_ptr(),
        log_counts=None if found.log_counts is None else found.log_counts.data_ptr(),
        count=count,
        head_dim=dim,
        format=DENSE_DTYPES.index(dtype),
        num_threads=num_threads or torch.get_num_threads(),
    )
    status = native.library().steno_gather(ctypes.byref(problem))
    if status == UNKNOWN_FORMAT:
        return None
    if status:
        raise BadArgument("tokens must lie within their span; got one outside.")
    return found


def _has_log_counts(table: SpanTable) -> bool:
    return bool(table.entries[:, Column.LOG_COUNTS].any())


def _gather(
    table: SpanTable, entry_ids: Tensor, token_ids: Tensor, dtype: torch.dtype, device: torch.device, values: bool
) -> Gathered:
    """`gather_tokens` in plain torch, entry by entry."""
    spans = [span for row in table.rows for head in row for span in head]
    keys = torch.empty(len(entry_ids), table.head_dim, dtype=dtype, device=device)
    out = torch.empty_like(keys) if values else None
    counts = torch.zeros(len(entry_ids), device=device) if _has_log_counts(table) else None
    for idx in entry_ids.unique().tolist():
        where = (entry_ids == idx).nonzero()[:, 0]
        tokens, span = token_ids[where], spans[idx]
        if int(tokens.min()) < 0 or int(tokens.max()) >= table.tokens_of(idx):
            raise BadArgument("tokens must lie within their span; got one outside.")
        place = tokens.to(span.tensors[0].device)
        k, v = span.take(place, dtype)
        keys[where.to(device)] = k.to(device)
        if out is not None:
            out[where.to(device)] = v.to(device)
        if counts is not None and span.log_counts is not None:
            counts[where.to(device)] = span.log_counts[place].to(device)
    return Gathered(keys=keys, values=out, log_counts=counts)
