"""Pages encoded and decoded by Triton kernels, and the decoding of one matrix that attention shares."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from steno.kernels.triton_runtime import check_device, compute_dtype
from steno.types import PAGE_TOKENS, PageFormat

from . import groups, packing

LANES = tl.constexpr(packing.LANES)
BYTE_ROWS = tl.constexpr(packing.BYTE_ROWS)
TOKENS = tl.constexpr(PAGE_TOKENS)
FP16_MAX = tl.constexpr(groups.FP16_MAX)
MIN_SCALE = tl.constexpr(groups.MIN_SCALE)
ROUND_TO_EVEN = tl.constexpr(1.5 * 2**23)
"""Adding and subtracting it rounds a small fp32 number to the nearest integer, ties to even."""


@triton.jit
def field_shifts(BITS: tl.constexpr):
    """From which bit of a dword on the rows of a line lie, `[32 / BITS]`: the rule of packing.py."""
    row = tl.arange(0, 32 // BITS)
    return 8 * (row % BYTE_ROWS) + BITS * (row // BYTE_ROWS)


@triton.jit
def load_matrix(
    codes,
    params,
    R: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    R_PAD: tl.constexpr,
    C_PAD: tl.constexpr,
):
    """The matrix `[R_PAD, C_PAD]` fp32 behind packed codes and params of `[R, C]`; rows from R on are zero.

    The dwords of all lines are a matrix `[ceil(R * BITS / 32), C in whole blocks]`, each with one field for every row
    of its line, so they are read once and opened in registers.
    """
    LINE_ROWS: tl.constexpr = 32 // BITS
    NUM_LINES: tl.constexpr = (R + LINE_ROWS - 1) // LINE_ROWS
    NUM_BLOCKS: tl.constexpr = (C + LANES - 1) // LANES
    NUM_GROUPS: tl.constexpr = (C + GROUP - 1) // GROUP
    line = tl.arange(0, R_PAD // LINE_ROWS)[:, None]
    column = tl.arange(0, C_PAD)[None, :]
    stored = (line < NUM_LINES) & (column < NUM_BLOCKS * LANES)
    dwords = tl.load(codes + line * (NUM_BLOCKS * LANES) + column, mask=stored, other=0)
    fields = (dwords[:, None, :] >> field_shifts(BITS)[None, :, None]) & ((1 << BITS) - 1)  # [lines, rows, C_PAD]
    blocks = tl.reshape(fields.to(tl.float32), [R_PAD, C_PAD // LANES, LANES])
    # groups are whole blocks, but not always a power of two of them: one scale and minimum per block fits all
    row = tl.arange(0, R_PAD)[:, None]
    block = tl.arange(0, C_PAD // LANES)[None, :]
    param = params + (block * LANES // GROUP) * R + row
    stored = (row < R) & (block < NUM_BLOCKS)
    scale = tl.load(param, mask=stored, other=0).to(tl.float32)
    minimum = tl.load(param + NUM_GROUPS * R, mask=stored, other=0).to(tl.float32)
    return tl.reshape(blocks * scale[:, :, None] + minimum[:, :, None], [R_PAD, C_PAD])


@triton.jit
def _encode_group(
    matrix,
    row_stride,
    column_stride,
    codes,
    params,
    group,
    R: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    R_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
):
    """Quantize the columns of one group of a matrix `[R, C]`, write their dwords, scales and minima."""
    LINE_ROWS: tl.constexpr = 32 // BITS
    NUM_LINES: tl.constexpr = (R + LINE_ROWS - 1) // LINE_ROWS
    NUM_BLOCKS: tl.constexpr = (C + LANES - 1) // LANES
    NUM_GROUPS: tl.constexpr = (C + GROUP - 1) // GROUP
    TOP: tl.constexpr = (1 << BITS) - 1
    row = tl.arange(0, R_PAD)
    within = tl.arange(0, GROUP_PAD)
    column = group * GROUP + within
    present = (within < GROUP) & (column < C)
    x = tl.load(
        matrix + row[:, None] * row_stride + column[None, :] * column_stride,
        mask=(row < R)[:, None] & present[None, :],
        other=0,
    ).to(tl.float32)
    low = tl.min(tl.where(present[None, :], x, float("inf")), axis=1)
    high = tl.max(tl.where(present[None, :], x, -float("inf")), axis=1)
    minimum = tl.minimum(tl.maximum(low, -FP16_MAX), FP16_MAX).to(tl.float16)
    step = tl.div_rn(high - minimum.to(tl.float32), tl.full([R_PAD], TOP, tl.float32))
    scale = tl.minimum(tl.maximum(step, MIN_SCALE), FP16_MAX).to(tl.float16)
    tl.store(params + group * R + row, scale, mask=row < R)
    tl.store(params + (NUM_GROUPS + group) * R + row, minimum, mask=row < R)

    inverse = tl.div_rn(tl.full([R_PAD], 1.0, tl.float32), scale.to(tl.float32))
    code = (x - minimum.to(tl.float32)[:, None]) * inverse[:, None]
    # clamped before it is rounded, so the product is never fused into the sum, which would round it once less
    code = tl.minimum(tl.maximum(code, 0.0), TOP) + ROUND_TO_EVEN - ROUND_TO_EVEN
    code = tl.where((row < R)[:, None] & present[None, :], code, 0.0).to(tl.uint32)
    fields = tl.reshape(code, [R_PAD // LINE_ROWS, LINE_ROWS, GROUP_PAD]) << field_shifts(BITS)[None, :, None]
    line = tl.arange(0, R_PAD // LINE_ROWS)
    stored = (line < NUM_LINES)[:, None] & ((within < _whole_blocks(GROUP)) & (column < NUM_BLOCKS * LANES))[None, :]
    dwords = codes + line[:, None] * (NUM_BLOCKS * LANES) + column[None, :]
    tl.store(dwords, tl.sum(fields, axis=1).to(tl.uint32), mask=stored)


@triton.jit
def _whole_blocks(COLUMNS: tl.constexpr):
    return (COLUMNS + LANES - 1) // LANES * LANES


@triton.jit
def _encode_kernel(
    keys,
    values,
    key_codes,
    value_codes,
    key_params,
    value_params,
    key_page_stride,
    key_token_stride,
    key_channel_stride,
    value_page_stride,
    value_token_stride,
    value_channel_stride,
    key_code_stride,
    value_code_stride,
    D: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    D_PAD: tl.constexpr,
    VALUE_GROUP_PAD: tl.constexpr,
):
    """Program (p, g) encodes group g of page p: the groups of the keys, then those of the values."""
    NUM_KEY_GROUPS: tl.constexpr = TOKENS // KEY_GROUP
    NUM_VALUE_GROUPS: tl.constexpr = (D + VALUE_GROUP - 1) // VALUE_GROUP
    page = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if group < NUM_KEY_GROUPS:
        _encode_group(
            keys + page * key_page_stride,
            key_channel_stride,
            key_token_stride,
            key_codes + page * key_code_stride,
            key_params + page * (2 * NUM_KEY_GROUPS * D),
            group,
            D,
            TOKENS,
            BITS,
            KEY_GROUP,
            D_PAD,
            KEY_GROUP,
        )
    else:
        _encode_group(
            values + page * value_page_stride,
            value_token_stride,
            value_channel_stride,
            value_codes + page * value_code_stride,
            value_params + page * (2 * NUM_VALUE_GROUPS * TOKENS),
            group - NUM_KEY_GROUPS,
            TOKENS,
            D,
            BITS,
            VALUE_GROUP,
            TOKENS,
            VALUE_GROUP_PAD,
        )


@triton.jit
def _decode_kernel(
    key_codes,
    value_codes,
    key_params,
    value_params,
    keys,
    values,
    key_code_stride,
    value_code_stride,
    D: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Program (p, 0) decodes the keys of page p, program (p, 1) its values, both to `[64, D]`."""
    NUM_KEY_GROUPS: tl.constexpr = TOKENS // KEY_GROUP
    NUM_VALUE_GROUPS: tl.constexpr = (D + VALUE_GROUP - 1) // VALUE_GROUP
    page = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, TOKENS)
    channel = tl.arange(0, D_PAD)
    if tl.program_id(1) == 0:
        codes, params = key_codes + page * key_code_stride, key_params + page * (2 * NUM_KEY_GROUPS * D)
        k = load_matrix(codes, params, D, TOKENS, BITS, KEY_GROUP, D_PAD, TOKENS)
        transposed = keys + (page * TOKENS + token[None, :]) * D + channel[:, None]
        tl.store(transposed, k.to(keys.dtype.element_ty), mask=(channel < D)[:, None])
    else:
        codes, params = value_codes + page * value_code_stride, value_params + page * (2 * NUM_VALUE_GROUPS * TOKENS)
        v = load_matrix(codes, params, TOKENS, D, BITS, VALUE_GROUP, TOKENS, D_PAD)
        rows = values + (page * TOKENS + token[:, None]) * D + channel[None, :]
        tl.store(rows, v.to(values.dtype.element_ty), mask=(channel < D)[None, :])


def padded(size: int) -> int:
    """The power of two, at least a block of lanes, that holds `size` columns."""
    return max(packing.LANES, triton.next_power_of_2(size))


def _num_warps(head_dim: int) -> int:
    """As few as hold a matrix in registers."""
    return 4 if padded(head_dim) <= 128 else 8


def encode(keys: Tensor, values: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """key_codes, value_codes, key_params, value_params of keys and values `[P, 64, D]` of any strides, in one launch."""
    for x in (keys, values):
        check_device(_encode_kernel, x)
    num_pages, _, head_dim = keys.shape
    value_group = min(fmt.value_group, head_dim)
    num_groups = PAGE_TOKENS // fmt.key_group, -(-head_dim // value_group)
    key_codes = keys.new_empty(num_pages, packing.code_bytes(head_dim, PAGE_TOKENS, fmt.bits), dtype=torch.uint8)
    value_codes = keys.new_empty(num_pages, packing.code_bytes(PAGE_TOKENS, head_dim, fmt.bits), dtype=torch.uint8)
    key_params = keys.new_empty(num_pages, 2, num_groups[0], head_dim, dtype=torch.float16)
    value_params = keys.new_empty(num_pages, 2, num_groups[1], PAGE_TOKENS, dtype=torch.float16)
    if num_pages:
        with torch.cuda.device_of(keys):
            _encode_kernel[num_pages, sum(num_groups)](
                keys,
                values,
                key_codes.view(torch.uint32),
                value_codes.view(torch.uint32),
                key_params,
                value_params,
                *keys.stride(),
                *values.stride(),
                key_codes.shape[1] // 4,
                value_codes.shape[1] // 4,
                D=head_dim,
                BITS=fmt.bits,
                KEY_GROUP=fmt.key_group,
                VALUE_GROUP=value_group,
                D_PAD=padded(head_dim),
                VALUE_GROUP_PAD=padded(value_group),
                num_warps=_num_warps(head_dim),
            )
    return key_codes, value_codes, key_params, value_params


def decode(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], fmt: PageFormat, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values `[P, 64, D]` of the pages whose `Pages.tensors` are given, in one launch."""
    key_codes, value_codes, key_params, value_params = tensors
    for x in tensors:
        check_device(_decode_kernel, x)
    num_pages = key_codes.shape[0]
    keys = key_params.new_empty(num_pages, PAGE_TOKENS, head_dim, dtype=compute_dtype(_decode_kernel, dtype))
    values = torch.empty_like(keys)
    if num_pages:
        with torch.cuda.device_of(keys):
            _decode_kernel[num_pages, 2](
                key_codes.view(torch.uint32),
                value_codes.view(torch.uint32),
                key_params,
                value_params,
                keys,
                values,
                key_codes.shape[1] // 4,
                value_codes.shape[1] // 4,
                D=head_dim,
                BITS=fmt.bits,
                KEY_GROUP=fmt.key_group,
                VALUE_GROUP=min(fmt.value_group, head_dim),
                D_PAD=padded(head_dim),
                num_warps=_num_warps(head_dim),
            )
    return keys.to(dtype), values.to(dtype)
