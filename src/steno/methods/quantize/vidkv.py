"""VidKV: keys at 1.5 bits, half of their channels in 2 bits and half in 1 bit of a Fourier transform; values in 1.58 bits.

Source: Tao, You, Sui, Qin, Wang, 2025, https://arxiv.org/abs/2503.16257, sections 3.2 and 3.3; the released code for groups.
Differs: the widest channels are found for each KV head and chunk, where the code has one set for all heads. The transform
    runs over the channels that are left and is that of real numbers, whose spectrum has as many numbers as channels, so a
    bit each (the code stores the mirrored half too). Ternary values are packed by fives in a byte and decoded with the scale
    that they were quantized with, which the released decoder does not. No second bit for values of tokens that the text
    asks for, as the cache does not know which tokens are pictures.
Cost: a product of each key with a [D / 2, D / 2] matrix when a chunk closes, of each query with it per step. With groups of
    32 and D a multiple of 64: keys 3 and 1.5 bits a value, values 2.125 bits, scales counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.parts import PartsSegment
from steno.cache.segment import HeadKV, Segment
from steno.kernels.quant.matrices import (
    Matrices,
    column_products,
    pack_integers,
    pack_signs,
    pack_ternary,
    row_products,
)
from steno.kernels.quant.packing import LANES, LINE_BYTES, TRITS_PER_BYTE, code_bytes
from steno.methods.checks import require_choice, require_multiple, require_real
from steno.types import PAGE_TOKENS, KeptTokens, Need


@lru_cache(maxsize=64)
def fourier(size: int) -> tuple[Tensor, Tensor]:
    """The transform `[size, size]` fp32 of real numbers, real parts then imaginary ones without those that are 0; its inverse."""
    spectrum = torch.fft.rfft(torch.eye(size, dtype=torch.float64))  # [size, size // 2 + 1]
    forward = torch.cat([spectrum.real, spectrum.imag[:, 1 : (size + 1) // 2]], dim=1)
    return forward.float(), torch.linalg.inv(forward).float()


@final
@dataclass(frozen=True, kw_only=True)
class VidHead:
    """One KV head: P chunks of 64 tokens. order: `[D]` int16, the wide channels first.

    wide: matrices `[W, 64]` or None, the others' spectrum `[D - W, 64]` or None; values `[64, D]`.
    """

    order: Tensor
    wide: Matrices | None
    spectrum: Matrices | None
    values: Matrices

    @property
    def num_tokens(self) -> int:
        return self.values.num_matrices * PAGE_TOKENS

    def logits(self, q: Tensor) -> Tensor:
        q = q[:, self.order.long()]
        split = 0 if self.wide is None else self.wide.rows
        out = q.new_zeros(len(q), self.num_tokens)
        if self.wide is not None:
            out = out + row_products(q[:, :split], self.wide)
        if self.spectrum is not None:
            back = fourier(self.spectrum.rows)[1].to(q)
            out = out + row_products(q[:, split:] @ back.T, self.spectrum)
        return out

    def mix(self, weights: Tensor) -> Tensor:
        return column_products(weights, self.values)

    def decode(self, dtype: torch.dtype) -> HeadKV:
        parts = []
        if self.wide is not None:
            parts.append(self.wide.decode().transpose(1, 2).flatten(0, 1))  # [n, W]
        if self.spectrum is not None:
            spectrum = self.spectrum.decode().transpose(1, 2).flatten(0, 1)
            parts.append(spectrum @ fourier(self.spectrum.rows)[1].to(spectrum))
        ordered = torch.cat(parts, dim=1)
        keys = torch.empty_like(ordered)
        keys[:, self.order.long()] = ordered
        return keys.to(dtype), self.values.decode().flatten(0, 1).to(dtype)


@final
@dataclass(frozen=True, kw_only=True)
class VidKV:
    """Keys and values in fewer than 2 bits.

    Parameters
    ----------
    key_bits : float, default 1.5 bits
        From 1 to 2: the share of channels above 1 has 2 bits, that with the widest ranges.
    group : int, default 32 tokens
        Tokens of a channel that share a scale: 16, 32 or 64.
    residual : int, default 128 tokens
        The tail is encoded when it holds this many; a multiple of 64.

    Raises
    ------
    BadArgument
        If a value is none of these.
    """

    id: ClassVar[str] = "vidkv"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "VidKV"
    paper: ClassVar[str] = "Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2503.16257"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Wide channels are found for each KV head and chunk; the spectrum is that of real numbers, one bit a channel; no "
        "second bit for values of tokens that the text asks for."
    )
    page_format: ClassVar[None] = None

    key_bits: float = 1.5
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        require_real("key_bits", self.key_bits, 1, 2)
        require_choice("group", self.group, (16, 32, 64))
        require_multiple("residual", self.residual, PAGE_TOKENS)

    @property
    def residual_tokens(self) -> int:
        return self.residual

    @property
    def chunk_tokens(self) -> int:
        return PAGE_TOKENS

    def _num_wide(self, head_dim: int) -> int:
        return int(head_dim * (self.key_bits - 1))

    def encode(self, tokens: KeptTokens) -> Segment:
        """Each head with its own wide channels."""
        return PartsSegment.of(tokens, lambda _, keys, values: self._head(keys, values))

    def _head(self, keys: Tensor, values: Tensor) -> VidHead:
        """keys, values `[n, D]` fp32."""
        split = self._num_wide(keys.shape[1])
        order = (keys.amax(0) - keys.amin(0)).argsort(descending=True, stable=True)
        ordered = keys[:, order].unflatten(0, (-1, PAGE_TOKENS))  # [P, 64, D]
        wide, spectrum = ordered[:, :, :split].transpose(1, 2), None
        if split < keys.shape[1]:
            spectrum = (ordered[:, :, split:] @ fourier(keys.shape[1] - split)[0].to(keys)).transpose(1, 2)
        return VidHead(
            order=order.to(torch.int16),
            wide=pack_integers(wide, bits=2, group=self.group) if split else None,
            spectrum=None if spectrum is None else pack_signs(spectrum, group=self.group),
            values=pack_ternary(values.unflatten(0, (-1, PAGE_TOKENS)), group=self.group),
        )

    def bytes_bound(self, num_tokens: int, *, num_kv_heads: int, head_dim: int) -> int | None:
        """All bytes of the chunks, and the order of the channels."""
        wide, groups = self._num_wide(head_dim), PAGE_TOKENS // self.group
        blocks = -(-head_dim // LANES)
        keys = code_bytes(wide, PAGE_TOKENS, 2) + code_bytes(head_dim - wide, PAGE_TOKENS, 1)
        values = -(-PAGE_TOKENS // TRITS_PER_BYTE) * blocks * (LINE_BYTES // 4)
        scales = 2 * groups * (2 * wide + head_dim - wide + blocks * LANES)
        return num_kv_heads * (-(-num_tokens // PAGE_TOKENS) * (keys + values + scales) + 2 * head_dim)
