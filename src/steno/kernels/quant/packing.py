"""How codes lie in memory.

Codes form a matrix `[R, C]`, C padded to blocks of 16 lanes. Block `b` of row `r` has the index `r * num_blocks + b`.
8 bits: plain bytes. 4 and 2 bits: lines of 64 bytes, 16 dwords, dword = lane; a line holds 8 (16) consecutive blocks,
the j-th of them from bit `4j` (`2j`) of every dword on. So one shift aligns 16 codes, and a table look-up decodes them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 16
"""Columns of a block: the floats of one AVX-512 register."""

LINE_BYTES = 64


def code_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of a packed matrix of codes, padding included."""
    num_blocks = rows * -(-columns // LANES)
    if bits == 8:
        return num_blocks * LANES
    return -(-num_blocks * bits // 32) * LINE_BYTES


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `[P, R, C]`, each below `2**bits`, into bytes `[P, code_bytes(R, C, bits)]`."""
    num_pages, rows, columns = codes.shape
    codes = pad(codes, (0, -columns % LANES)).reshape(num_pages, -1)  # [P, R * C_pad]
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    codes = pad(codes, (0, -codes.shape[1] % (LINE_BYTES * per_byte)))
    fields = codes.reshape(num_pages, -1, 4, per_byte, LANES)  # [P, line, byte of the dword, field of the byte, lane]
    packed = fields[:, :, :, 0]
    for j in range(1, per_byte):
        packed = packed | fields[:, :, :, j] << (bits * j)
    return packed.transpose(2, 3).reshape(num_pages, code_bytes(rows, columns, bits))


def unpack_codes(packed: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """The inverse of `pack_codes`: bytes `[P, code_bytes]` to uint8 codes `[P, R, C]`."""
    num_pages = packed.shape[0]
    num_columns = columns + -columns % LANES
    if bits != 8:
        dwords = packed.reshape(num_pages, -1, LANES, 4).transpose(2, 3)  # [P, line, byte, lane]
        fields = [(dwords >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        packed = torch.stack(fields, dim=3).reshape(num_pages, -1)
    return packed[:, : rows * num_columns].reshape(num_pages, rows, num_columns)[:, :, :columns]
