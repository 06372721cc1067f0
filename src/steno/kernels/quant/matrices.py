"""Packed matrices of any shape, and products with them for what no page format holds.

Keys lie transposed, `[D, 64]` a matrix, so their products with queries are sums over rows; so are those of weights with
values `[64, D]`. The native kernels open the codes in registers; without them some matrices at a time are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import cpu
from .codebooks import BOOK
from .groups import FP16_MAX, MIN_SCALE, as_half, dequantize_groups, quantize_groups
from .packing import LANES, pack_codes, pack_trits, unpack_codes, unpack_trits

PAGED, NO_SCALES, TRITS = 16, 512, 5
"""`kPaged`, `kNoScales` and `kTrits` of csrc/attend.h."""

BLOCK = 16
"""Matrices decoded at a time where there is no native product."""

SIGNS, TERNARY = (-1.0, 1.0), (-1.0, 0.0, 1.0)


@final
@dataclass(frozen=True, kw_only=True)
class Matrices:
    """P packed matrices `[R, C]` of one format.

    codes: `[P, bytes]` uint8. params, fp16: `[P, 2, groups, R]`, scales and minima of whole numbers (`quantize_groups`); or
    of codes that stand for levels the scales alone: `[P, groups, R]` for groups of columns, or, by_column,
    `[P, groups, C in whole blocks]` for groups of rows; or None where codes are multiplied by nothing.
    levels: those of a format, or, fitted to what is stored, `[16]` fp32, repeated to so many.
    """

    codes: Tensor
    params: Tensor | None
    rows: int
    columns: int
    bits: int
    group: int
    levels: tuple[float, ...] | Tensor | None = None
    by_column: bool = False

    @property
    def num_matrices(self) -> int:
        return self.codes.shape[0]

    @property
    def native_format(self) -> int:
        if self.levels is None:
            return PAGED + self.bits
        return BOOK + self.bits + (NO_SCALES if self.params is None else 0)

    def __getitem__(self, part: slice) -> Matrices:
        """A run of matrices, as views."""
        params = None if self.params is None else self.params[part]
        return Matrices(
            codes=self.codes[part], params=params, rows=self.rows, columns=self.columns, bits=self.bits,
            group=self.group, levels=self.levels, by_column=self.by_column,
        )  # fmt: skip

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for, `[P, R, C]`."""
        if self.bits == TRITS:
            codes = unpack_trits(self.codes, self.rows, self.columns)
        else:
            codes = unpack_codes(self.codes, self.rows, self.columns, self.bits)
        if self.levels is None:
            assert self.params is not None
            return dequantize_groups(codes, self.params, group=self.group, dtype=dtype)
        numbers = _level_table(self.levels).to(codes.device)[codes.long()]
        if self.params is None:
            return numbers.to(dtype)
        scales = self.params.float()
        if self.by_column:
            scales = scales.repeat_interleave(self.group, dim=1)[:, : self.rows, : self.columns]
        else:
            scales = scales.transpose(1, 2).repeat_interleave(self.group, dim=2)[:, :, : self.columns]
        return (numbers * scales).to(dtype)


def pack_integers(matrix: Tensor, *, bits: int, group: int) -> Matrices:
    """Whole numbers of 8, 4 or 2 bits with a scale and a minimum per `group` columns, of matrices `[P, R, C]`."""
    codes, params = quantize_groups(matrix, bits=bits, group=group)
    return Matrices(
        codes=pack_codes(codes, bits), params=params, rows=matrix.shape[1], columns=matrix.shape[2], bits=bits,
        group=min(group, matrix.shape[2]),
    )  # fmt: skip


def pack_plain(codes: Tensor, *, bits: int) -> Matrices:
    """Codes `[P, R, C]` uint8 of 4 or 2 bits that stand for themselves."""
    return pack_levels(codes, bits=bits, levels=tuple(float(i) for i in range(2**bits)), scales=None)


def pack_levels(codes: Tensor, *, bits: int, levels: tuple[float, ...] | Tensor, scales: Tensor | None) -> Matrices:
    """Codes `[P, R, C]` uint8 of 4, 2 or 1 bits that stand for levels, times scales `[P, 1, R]` fp16 of their rows or None."""
    _, rows, columns = codes.shape
    return Matrices(
        codes=pack_codes(codes, bits),
        params=scales,
        rows=rows,
        columns=columns,
        bits=bits,
        group=columns,
        levels=levels,
    )


def pack_signs(matrix: Tensor, *, group: int) -> Matrices:
    """The signs of matrices `[P, R, C]`, one bit each, times the mean magnitude of `group` columns of a row."""
    _, rows, columns = matrix.shape
    grouped = _grouped(matrix.float(), group)  # [P, R, groups, group], NaN in the padding
    scales = as_half(grouped.abs().nanmean(3)).transpose(1, 2).half().contiguous()
    return Matrices(
        codes=pack_codes((matrix >= 0).to(torch.uint8), 1), params=scales, rows=rows, columns=columns, bits=1,
        group=min(group, columns), levels=SIGNS,
    )  # fmt: skip


def pack_ternary(matrix: Tensor, *, group: int) -> Matrices:
    """-1, 0 and 1 times the mean magnitude of `group` rows of a column; what is below half of it becomes 0."""
    _, rows, columns = matrix.shape
    grouped = _grouped(matrix.float().transpose(1, 2), group)  # [P, C, groups, group]
    mean = grouped.abs().nanmean(3)  # [P, C, groups]
    expanded = mean.repeat_interleave(min(group, rows), dim=2)[:, :, :rows].transpose(1, 2)  # [P, R, C]
    digits = torch.where(matrix.abs() > 0.5 * expanded, matrix.sign(), 0.0).nan_to_num(0.0) + 1
    scales = pad(as_half(mean).transpose(1, 2).half(), (0, -columns % LANES)).contiguous()
    return Matrices(
        codes=pack_trits(digits.to(torch.uint8)), params=scales, rows=rows, columns=columns, bits=TRITS,
        group=min(group, rows), levels=TERNARY, by_column=True,
    )  # fmt: skip


def pack_columns(matrix: Tensor, *, bits: int, group: int) -> tuple[Matrices, Tensor]:
    """Whole numbers of 4 or 2 bits of matrices `[P, R, C]`, with a scale per `group` rows of a column; group divides R.

    What is to be added to them is the minimum of each group, `[P, R / group, C]` fp16.
    """
    _, rows, columns = matrix.shape
    grouped = matrix.float().unflatten(1, (-1, group))  # [P, groups, group, C]
    minima = as_half(grouped.amin(2))
    steps = as_half(((grouped.amax(2) - minima) / (2**bits - 1)).clamp(MIN_SCALE, FP16_MAX))
    codes = ((grouped - minima[:, :, None]) / steps[:, :, None]).round().clamp(0, 2**bits - 1).nan_to_num(0.0)
    packed = Matrices(
        codes=pack_codes(codes.flatten(1, 2).to(torch.uint8), bits),
        params=pad(steps.half(), (0, -columns % LANES)).contiguous(), rows=rows, columns=columns, bits=bits, group=group,
        levels=tuple(float(i) for i in range(2**bits)), by_column=True,
    )  # fmt: skip
    return packed, minima.half()


def _grouped(matrix: Tensor, group: int) -> Tensor:
    """`[P, R, C]` as `[P, R, groups, group]`, NaN behind the last column."""
    columns = matrix.shape[2]
    group = min(group, columns)
    return pad(matrix, (0, -columns % group), value=torch.nan).unflatten(2, (-1, group))


def _level_table(levels: tuple[float, ...] | Tensor) -> Tensor:
    return levels if isinstance(levels, Tensor) else _constant_table(levels)


@lru_cache(maxsize=16)
def _constant_table(levels: tuple[float, ...]) -> Tensor:
    return table_of(torch.tensor(levels))


def table_of(levels: Tensor) -> Tensor:
    """At most 16 levels as native code looks them up, `[16]` fp32: repeated."""
    return levels.float().repeat(16)[:16].clone()


def row_products(x: Tensor, matrices: Matrices) -> Tensor:
    """x `[M, R]` times every matrix, `[M, P * C]`: of queries and packed keys."""
    num, columns = matrices.num_matrices, matrices.columns
    if _is_native(x, matrices):
        padded = -(-columns // LANES) * LANES
        out = x.new_zeros(len(x), num, padded)
        cpu.multiply(_whole_rows(x, 1, matrices.rows), out, matrices, _table(matrices), x_step=0, out_step=padded)
        return out[:, :, :columns].reshape(len(x), -1)
    blocks = (matrices[at : at + BLOCK].decode(x.dtype) for at in range(0, num, BLOCK))
    parts = [(x @ block).transpose(0, 1).flatten(1) for block in blocks]
    return torch.cat(parts, dim=1) if parts else x.new_zeros(len(x), 0)


def column_products(x: Tensor, matrices: Matrices) -> Tensor:
    """The sum of x `[M, P * R]`, part by part, times the matrices, `[M, C]`: of weights and packed values."""
    rows, columns = matrices.rows, matrices.columns
    if _is_native(x, matrices):
        out = x.new_zeros(len(x), 1, -(-columns // LANES) * LANES)
        whole = _whole_rows(x, matrices.num_matrices, rows)
        cpu.multiply(whole, out, matrices, _table(matrices), x_step=whole.shape[2], out_step=0)
        return out[:, 0, :columns]
    out = x.new_zeros(len(x), columns)
    for at in range(0, matrices.num_matrices, BLOCK):
        part = matrices[at : at + BLOCK].decode(x.dtype)
        out += x[:, at * rows : (at + len(part)) * rows] @ part.flatten(0, 1)
    return out


def _whole_rows(x: Tensor, count: int, rows: int) -> Tensor:
    """x `[M, count * rows]` as `[M, count, rows in whole blocks]`, zeros behind."""
    return pad(x.reshape(len(x), count, rows), (0, -rows % LANES)).contiguous()


def _table(matrices: Matrices) -> Tensor | None:
    return None if matrices.levels is None else _level_table(matrices.levels)


def _is_native(x: Tensor, matrices: Matrices) -> bool:
    return x.dtype == torch.float32 and x.device.type == matrices.codes.device.type == "cpu" and cpu.is_there()
