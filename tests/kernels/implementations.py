"""The implementations that this machine can test, and tables where each of them can read them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steno.kernels import native, triton_runtime
from steno.kernels.attention import DenseSpan, PageSpan, Span, SpanTable, attend
from steno.kernels.attention.table import Column

HAS_TRITON = triton_runtime.why_missing() is None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU through Triton's interpreter
IMPLS = ["naive", *(["cpu"] if native.available_isas() else []), *(["triton"] if HAS_TRITON else [])]


def run(impl: str, q: Tensor, table: SpanTable, **options: object) -> tuple[Tensor, Tensor]:
    """`attend` by `impl`, where it runs; the result on the CPU."""
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    out, lse = attend(q.to(device), table_on(table, device), impl=impl, **options)
    return out.cpu(), lse.cpu()


def table_on(table: SpanTable, device: str) -> SpanTable:
    """The table with its spans on `device`: itself, or a copy with the same token counts and page ids."""
    if device == "cpu":
        return table
    rows = [[[_span_on(span, device) for span in head] for head in row] for row in table.rows]
    moved = SpanTable.build(rows, head_dim=table.head_dim)
    moved.entries[:, Column.TOKENS] = table.entries[:, Column.TOKENS]
    return moved.with_page_ids({idx: ids.to(device) for idx, ids in table.page_ids.items()})


def _span_on(span: Span, device: str) -> Span:
    log_counts = None if span.log_counts is None else span.log_counts.to(device)
    if isinstance(span, DenseSpan):
        return DenseSpan(span.keys.to(device), span.values.to(device), log_counts)
    names = ("key_codes", "value_codes", "key_params", "value_params")
    moved = {name: x.to(device) for name, x in zip(names, span.pages.tensors, strict=True)}
    return PageSpan(replace(span.pages, **moved), log_counts)
