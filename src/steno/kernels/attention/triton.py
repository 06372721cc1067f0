"""Attention by Triton kernels, on CUDA: flash-decoding over the items of a plan, straight from the packed codes.

Source: Dao et al., Flash-Decoding for long-context inference, 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
Differs: the context is cut at pages of ragged spans of several formats, the same number of pages for every program.
"""

from __future__ import annotations

from dataclasses import astuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from steno.errors import BadArgument
from steno.kernels.quant.triton import TOKENS, load_matrix, padded
from steno.kernels.triton_runtime import check_device, compute_dtype

from .plan import Item, plan_of
from .spans import DENSE_DTYPES
from .table import Column, SpanTable

QUERY_DTYPES = DENSE_DTYPES
PROGRAMS_PER_PROCESSOR = 4
"""Programs that share a streaming multiprocessor, so that some load while others compute."""

ENTRY_COLUMNS = tl.constexpr(len(Column))
KEYS = tl.constexpr(int(Column.KEYS))
VALUES = tl.constexpr(int(Column.VALUES))
KEY_PARAMS = tl.constexpr(int(Column.KEY_PARAMS))
VALUE_PARAMS = tl.constexpr(int(Column.VALUE_PARAMS))
NUM_TOKENS = tl.constexpr(int(Column.TOKENS))
LOG_COUNTS = tl.constexpr(int(Column.LOG_COUNTS))
PAGE_IDS = tl.constexpr(int(Column.PAGE_IDS))
NUM_PAGE_IDS = tl.constexpr(int(Column.NUM_PAGE_IDS))
ITEM_COLUMNS = tl.constexpr(len(Item))
HEAD = tl.constexpr(int(Item.HEAD))
ENTRY = tl.constexpr(int(Item.ENTRY))
FIRST_PAGE = tl.constexpr(int(Item.FIRST_PAGE))
KIND = tl.constexpr(int(Item.KIND))
LAST_SPAN = tl.constexpr(int(Item.LAST_SPAN))
PARTS = tl.constexpr(16)
"""Parts that are merged at a time."""


@triton.jit
def _dense_pointer(address, FORMAT: tl.constexpr, IS_ALIGNED: tl.constexpr):
    if FORMAT == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    return tl.multiple_of(pointer, 16) if IS_ALIGNED else pointer


@triton.jit
def _load_dense(address, index, valid, D: tl.constexpr, D_PAD: tl.constexpr, FORMAT: tl.constexpr, IS_ALIGNED):
    """Tokens `[64, D_PAD]` fp32 of a dense span; zeros where there are none."""
    channel = tl.arange(0, D_PAD)
    rows = _dense_pointer(address, FORMAT, IS_ALIGNED) + index.to(tl.int64)[:, None] * D
    return tl.load(rows + channel[None, :], mask=valid[:, None] & (channel < D)[None, :], other=0).to(tl.float32)


@triton.jit
def _load_packed(
    codes,
    params,
    page,
    R: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    R_PAD: tl.constexpr,
    C_PAD: tl.constexpr,
):
    """The matrix `[R_PAD, C_PAD]` fp32 of one page; codes, params: the addresses of the first page."""
    LINE_ROWS: tl.constexpr = 32 // BITS
    DWORDS: tl.constexpr = (R + LINE_ROWS - 1) // LINE_ROWS * ((C + 15) // 16) * 16
    PARAMS: tl.constexpr = 2 * ((C + GROUP - 1) // GROUP) * R
    return load_matrix(
        tl.multiple_of(codes.to(tl.pointer_type(tl.uint32)), 16) + page.to(tl.int64) * DWORDS,
        params.to(tl.pointer_type(tl.float16)) + page.to(tl.int64) * PARAMS,
        R,
        C,
        BITS,
        GROUP,
        R_PAD,
        C_PAD,
    )


@triton.jit
def _load_tile(
    entry,
    page,
    index,
    valid,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    """Keys `[D_PAD, 64]` and values `[64, D_PAD]` fp32 of a page of an entry, dense or packed."""
    keys = tl.load(entry + KEYS)
    values = tl.load(entry + VALUES)
    if BITS == 0:
        k = tl.trans(_load_dense(keys, index, valid, D, D_PAD, FORMAT, IS_ALIGNED))
        v = _load_dense(values, index, valid, D, D_PAD, FORMAT, IS_ALIGNED)
    else:
        k = _load_packed(keys, tl.load(entry + KEY_PARAMS), page, D, TOKENS, BITS, KEY_GROUP, D_PAD, TOKENS)
        v = _load_packed(values, tl.load(entry + VALUE_PARAMS), page, TOKENS, D, BITS, VALUE_GROUP, TOKENS, D_PAD)
    return k, v


@triton.jit
def _tanh(x):
    fallen = tl.exp(-2 * tl.abs(x))  # never overflows
    return tl.where(x < 0, -1.0, 1.0) * (1 - fallen) / (1 + fallen)


@triton.jit
def _attend_item(
    q,
    entry,
    first,
    causal_end,
    row_token,
    scale,
    softcap,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    """Attention of q `[BLOCK_M, D_PAD]` over pages `first .. first + PAGES` of an entry.

    Returns the weighted sum of values `[BLOCK_M, D_PAD]`, the largest logit and the sum of weights `[BLOCK_M]`.
    """
    num_tokens = tl.load(entry + NUM_TOKENS).to(tl.int32)
    log_counts = tl.load(entry + LOG_COUNTS)
    page_ids = tl.load(entry + PAGE_IDS).to(tl.pointer_type(tl.int32))
    num_page_ids = tl.load(entry + NUM_PAGE_IDS).to(tl.int32)
    num_held = (num_tokens + TOKENS - 1) // TOKENS
    num_pages = tl.where(num_page_ids < 0, num_held, num_page_ids)
    last_seen = num_tokens - causal_end + row_token  # [BLOCK_M]
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for i in range(first, tl.minimum(first + PAGES, num_pages)):
        page = tl.load(page_ids + i, mask=num_page_ids >= 0, other=i)
        is_held = (page >= 0) & (page < num_held)
        page = tl.where(is_held, page, 0)
        index = page * TOKENS + tl.arange(0, TOKENS)
        valid = is_held & (index < num_tokens)
        k, v = _load_tile(entry, page, index, valid, D, D_PAD, FORMAT, BITS, KEY_GROUP, VALUE_GROUP, IS_ALIGNED)
        x = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            x = softcap * _tanh(x / softcap)
        counted = valid & (log_counts != 0)
        x += tl.load(log_counts.to(tl.pointer_type(tl.float32)) + index, mask=counted, other=0)[None, :]
        x = tl.where(valid[None, :] & (index[None, :] <= last_seen[:, None]), x, -float("inf"))
        new_best = tl.maximum(best, tl.max(x, axis=1))
        shift = tl.where(new_best == -float("inf"), 0.0, new_best)
        weights = tl.exp(x - shift[:, None])
        faded = tl.exp(best - shift)
        total = total * faded + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(q.dtype), v.to(q.dtype), out * faded[:, None], input_precision="ieee")
        best = new_best
    return out, best, total


@triton.jit
def _attend_kernel(
    q,
    entries,
    items,
    part_out,
    part_best,
    part_total,
    num_rows,
    num_queries,
    scale,
    softcap,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGES: tl.constexpr,
    KINDS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Program (i, m) attends with block m of the rows `[G * T]` of a head over item i and writes part i."""
    item = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D_PAD)
    line = items + item * ITEM_COLUMNS
    head = tl.load(line + HEAD).to(tl.int64)
    kind = tl.load(line + KIND)
    entry = entries + tl.load(line + ENTRY) * ENTRY_COLUMNS
    first = tl.load(line + FIRST_PAGE)
    offsets = row[:, None] * D + channel[None, :]
    mask = (row < num_rows)[:, None] & (channel < D)[None, :]
    queries = tl.load(q + head * num_rows * D + offsets, mask=mask, other=0)
    # of the last span, query t sees all but the newest T - 1 - t tokens; of every other span, all
    is_causal = (tl.load(line + LAST_SPAN) != 0) & CAUSAL
    causal_end = tl.where(is_causal, num_queries, 0)
    row_token = tl.where(is_causal, row % num_queries, 0)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            out, best, total = _attend_item(
                queries, entry, first, causal_end, row_token, scale, softcap,
                D, D_PAD, BLOCK_M, PAGES, HAS_SOFTCAP, KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4],
            )  # fmt: skip
            part = item.to(tl.int64) * num_rows
            tl.store(part_out + part * D + offsets, out, mask=mask)
            tl.store(part_best + part + row, best, mask=row < num_rows)
            tl.store(part_total + part + row, total, mask=row < num_rows)


@triton.jit
def _merge_kernel(
    part_out, part_best, part_total, item_offsets, out, lse, num_rows, D: tl.constexpr, D_PAD: tl.constexpr
):
    """Program `h * num_rows + r` puts the parts of row r of head h together."""
    head = tl.program_id(0) // num_rows
    row = tl.program_id(0) % num_rows
    channel = tl.arange(0, D_PAD)
    first = tl.load(item_offsets + head)
    end = tl.load(item_offsets + head + 1)
    best = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([D_PAD], tl.float32)
    for start in range(first, end, PARTS):
        part = start + tl.arange(0, PARTS)
        line = part.to(tl.int64) * num_rows + row
        bests = tl.load(part_best + line, mask=part < end, other=-float("inf"))
        totals = tl.load(part_total + line, mask=part < end, other=0)
        outs = tl.load(
            part_out + line[:, None] * D + channel[None, :],
            mask=(part < end)[:, None] & (channel < D)[None, :],
            other=0,
        )
        new_best = tl.maximum(best, tl.max(bests, axis=0))
        shift = tl.where(new_best == -float("inf"), 0.0, new_best)
        weights = tl.exp(bests - shift)
        faded = tl.exp(best - shift)
        total = total * faded + tl.sum(weights * totals, axis=0)
        acc = acc * faded + tl.sum(weights[:, None] * outs, axis=0)
        best = new_best
    is_empty = total == 0
    total = tl.where(is_empty, 1.0, total)
    line = head.to(tl.int64) * num_rows + row
    tl.store(out + line * D + channel, (acc / total).to(out.dtype.element_ty), mask=channel < D)
    tl.store(lse + line + tl.arange(0, 1), tl.where(is_empty, -float("inf"), best + tl.log(total)))


def attend(
    q: Tensor,
    table: SpanTable,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    num_programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Like `naive.attend`, for tensors on CUDA; products of fp32 queries are fp32, others have the dtype of q.

    Page ids outside their span are passed over: to refuse them would mean to wait for the device.

    Parameters
    ----------
    num_programs: into how many pieces the context is cut, about; None: as many as keep the device busy.

    Raises
    ------
    BadArgument: fp64 queries, tensors that the kernels cannot read where they lie.
    """
    check_device(_attend_kernel, q)
    if q.dtype not in QUERY_DTYPES:
        raise BadArgument(f"the Triton kernel takes fp32, bf16 or fp16 queries; got {q.dtype}.")
    num_heads, head_dim = table.num_rows * table.num_kv_heads, q.shape[3]
    num_rows = q.shape[0] * q.shape[1] * q.shape[2] // num_heads  # G * T
    queries = q.to(compute_dtype(_attend_kernel, q.dtype)).contiguous()
    out, lse = torch.empty_like(queries), q.new_empty(q.shape[:3], dtype=torch.float32)
    if not num_rows:
        return out.to(q.dtype), lse
    block, launch = _launch_shape(queries.dtype, num_rows, head_dim)
    num_blocks = triton.cdiv(num_rows, block)
    plan = plan_of(table, q.device, num_programs or max(1, _programs_of(q.device) // num_blocks))
    num_items = len(plan.items)
    part_out = q.new_empty(num_items, num_rows, head_dim, dtype=torch.float32)
    part_best, part_total = q.new_empty(2, num_items, num_rows, dtype=torch.float32).unbind()
    with torch.cuda.device_of(q):
        if num_items:
            _attend_kernel[num_items, num_blocks](
                queries, plan.entries, plan.items, part_out, part_best, part_total, num_rows, q.shape[2], scale, softcap or 0.0,
                D=head_dim, D_PAD=padded(head_dim), BLOCK_M=block, PAGES=plan.pages_per_item,
                KINDS=tuple(astuple(kind) for kind in plan.kinds), CAUSAL=causal, HAS_SOFTCAP=bool(softcap), **launch,
            )  # fmt: skip
        _merge_kernel[(num_heads * num_rows,)](
            part_out, part_best, part_total, plan.item_offsets, out, lse, num_rows, D=head_dim, D_PAD=padded(head_dim)
        )
    return out.to(q.dtype), lse


def _launch_shape(dtype: torch.dtype, num_rows: int, head_dim: int) -> tuple[int, dict[str, int]]:
    """Rows of a block, warps and stages that compile without registers spilled, or nearly so, on sm_80 and sm_90."""
    width = padded(head_dim)
    most = 16 if dtype == torch.float32 else 64 if width <= 128 else 32
    return min(padded(num_rows), most), {"num_warps": 4 if width <= 64 else 8, "num_stages": 2 if width <= 128 else 1}


def _programs_of(device: torch.device) -> int:
    """How many programs keep a device busy; the interpreter runs them one after the other."""
    if device.type != "cuda":
        return 1
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
