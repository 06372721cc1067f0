"""How codes lie in memory.

Codes form a matrix `[R, C]`, C padded to blocks of 16 columns and R to the rows of a line, with zeros. A line is 64
bytes, 16 dwords, one for each column of a block, and holds `32 / bits` rows: row `4j + i` of them is the j-th field,
from bit `j * bits` on, of byte i. Lines run through the blocks of a group of rows, then through the groups.

So a shift and a mask give 64 codes of one byte each, four rows of a column beside each other: what a dot product of
bytes (VNNI) takes; and a shift alone gives 16 codes of one row, for a table look-up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 16
"""Columns of a block: the dwords of one AVX-512 register."""

LINE_BYTES = 64
BYTE_ROWS = 4
"""Rows side by side in a dword."""


def rows_per_line(bits: int) -> int:
    """Rows of a block that one line holds."""
    return 32 // bits


def code_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of a packed matrix of codes, padding included."""
    return -(-rows // rows_per_line(bits)) * -(-columns // LANES) * LINE_BYTES


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `[P, R, C]`, each below `2**bits`, into bytes `[P, code_bytes(R, C, bits)]`."""
    num_pages, rows, columns = codes.shape
    codes = pad(codes, (0, -columns % LANES, 0, -rows % rows_per_line(bits)))
    per_byte = 8 // bits
    # [P, row group, field, byte, block, lane]
    fields = codes.reshape(num_pages, -1, per_byte, BYTE_ROWS, codes.shape[2] // LANES, LANES)
    packed = fields[:, :, 0]
    for j in range(1, per_byte):
        packed = packed | fields[:, :, j] << (bits * j)
    return packed.permute(0, 1, 3, 4, 2).reshape(num_pages, -1)  # [P, row group, block, lane, byte]


def unpack_codes(packed: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """The inverse of `pack_codes`: bytes `[P, code_bytes]` to uint8 codes `[P, R, C]`."""
    num_pages, num_blocks, per_byte = packed.shape[0], -(-columns // LANES), 8 // bits
    lines = packed.reshape(num_pages, -1, 1, num_blocks, LANES, BYTE_ROWS).permute(0, 1, 2, 5, 3, 4)
    shifts = packed.new_tensor(range(0, 8, bits)).view(per_byte, 1, 1, 1)
    codes = (lines >> shifts) & (2**bits - 1)  # [P, row group, field, byte, block, lane]
    return codes.reshape(num_pages, -1, num_blocks * LANES)[:, :rows, :columns]


TRITS_PER_BYTE = 5


def pack_trits(digits: Tensor) -> Tensor:
    """Pack digits 0, 1, 2 `[P, R, C]` uint8 by fives of a column into bytes `[P, ceil(R / 5) * C in whole blocks]`.

    A byte is the fraction 0.d0d1d2d3d4 in base 3, times 256, rounded up: times 3, its first digit steps out above 256.
    """
    num_pages, rows, columns = digits.shape
    fives = pad(digits, (0, -columns % LANES, 0, -rows % TRITS_PER_BYTE)).unflatten(1, (-1, TRITS_PER_BYTE)).int()
    value = sum(fives[:, :, i] * 3 ** (4 - i) for i in range(TRITS_PER_BYTE))
    return ((value * 256 + 242) // 243).to(torch.uint8).reshape(num_pages, -1)


def unpack_trits(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_trits`: digits `[P, R, C]` uint8."""
    rest = packed.reshape(packed.shape[0], -(-rows // TRITS_PER_BYTE), -1).int()  # [P, fives, C in whole blocks]
    digits = []
    for _ in range(TRITS_PER_BYTE):
        rest = rest * 3
        digits.append(rest >> 8)
        rest = rest & 255
    return torch.stack(digits, dim=2).flatten(1, 2)[:, :rows, :columns].to(torch.uint8)
