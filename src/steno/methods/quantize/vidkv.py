"""VidKV: keys at 1.5 bits, half of their channels in 2 bits and half in 1 bit of a Fourier transform; values in 1.58 bits.

Source: Tao, You, Sui, Qin, Wang, 2025, https://arxiv.org/abs/2503.16257, sections 3.2 and 3.3; the released code for groups.
Differs: the widest channels are found for each KV head and chunk, where the code has one set for all heads. The transform
    runs over the channels that are left and is that of real numbers, whose spectrum has as many numbers as channels, so a
    bit each (the code stores the mirrored half too). Ternary values are packed by fives in a byte and decoded with the scale
    that they were quantized with, which the released decoder does not. Which image tokens the text asks for (`vidkv_stp`)
    is told in every layer by what goes into its attention, the paper tells it once by the input embeddings; they come in
    64s, not 32s, and none of them is left out, as the last 32 are in the code.
Cost: a product of each key with a [D / 2, D / 2] matrix when a chunk closes, of each query with it per step. With groups of
    32 and D a multiple of 64: keys 3 and 1.5 bits a value, values 2.125 bits, of tokens that the text asks for 3, scales
    counted, and a bit per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.parts import PartsSegment
from steno.cache.row import pack_kept, unpack_kept
from steno.cache.segment import HeadKV, Segment
from steno.kernels.quant.matrices import (
    Matrices,
    column_products,
    pack_columns,
    pack_integers,
    pack_signs,
    pack_ternary,
    row_products,
)
from steno.kernels.quant.packing import LANES, LINE_BYTES, TRITS_PER_BYTE, code_bytes
from steno.methods.checks import require_choice, require_multiple, require_real
from steno.types import PAGE_TOKENS, KeptTokens, Need

_DIFFERS = (
    "Wide channels are found for each KV head and chunk; the spectrum is that of real numbers, one bit a channel; ternary "
    "values are decoded with their scale."
)


@lru_cache(maxsize=64)
def fourier(size: int) -> tuple[Tensor, Tensor]:
    """The transform `[size, size]` fp32 of real numbers, real parts then imaginary ones without those that are 0; its inverse."""
    spectrum = torch.fft.rfft(torch.eye(size, dtype=torch.float64))  # [size, size // 2 + 1]
    forward = torch.cat([spectrum.real, spectrum.imag[:, 1 : (size + 1) // 2]], dim=1)
    return forward.float(), torch.linalg.inv(forward).float()


@final
@dataclass(frozen=True, kw_only=True)
class FineValues:
    """Values in 2 bits of some tokens of a head, matrices `[64, D]` above `minima` `[P, groups, D]` fp16.

    chosen: a bitmap of the head's tokens.
    """

    chosen: Tensor
    codes: Matrices
    minima: Tensor

    def mix(self, weights: Tensor) -> Tensor:
        """weights: of these tokens alone."""
        above = weights.unflatten(1, (-1, self.codes.group)).sum(2)  # [M, P * groups]
        return column_products(weights, self.codes) + above @ self.minima.flatten(0, 1).to(weights.dtype)

    def decode(self) -> Tensor:
        """`[k, D]` fp32."""
        minima = self.minima.float().repeat_interleave(self.codes.group, dim=1)
        return (self.codes.decode() + minima).flatten(0, 1)


@final
@dataclass(frozen=True, kw_only=True)
class VidHead:
    """One KV head: P chunks of 64 tokens. order: `[D]` int16, the wide channels first.

    wide: matrices `[W, 64]` or None, the others' spectrum `[D - W, 64]` or None; values `[64, D]`, ternary, or None, of
    the tokens that are not in `fine`.
    """

    num_tokens: int
    order: Tensor
    wide: Matrices | None
    spectrum: Matrices | None
    values: Matrices | None
    fine: FineValues | None = None

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

    def _places(self) -> tuple[Tensor, Tensor]:
        """The tokens in `fine` and the others."""
        assert self.fine is not None
        (chosen,) = unpack_kept(self.fine.chosen)
        return chosen, _others(chosen, self.num_tokens)

    def mix(self, weights: Tensor) -> Tensor:
        if self.fine is None:
            assert self.values is not None
            return column_products(weights, self.values)
        chosen, others = self._places()
        out = self.fine.mix(weights[:, chosen])
        return out if self.values is None else out + column_products(weights[:, others], self.values)

    def keys_between(self, first: int, last: int) -> Tensor:
        parts, pages = [], slice(first // PAGE_TOKENS, last // PAGE_TOKENS)
        if self.wide is not None:
            parts.append(self.wide[pages].decode().transpose(1, 2).flatten(0, 1))  # [m, W]
        if self.spectrum is not None:
            spectrum = self.spectrum[pages].decode().transpose(1, 2).flatten(0, 1)
            parts.append(spectrum @ fourier(self.spectrum.rows)[1].to(spectrum))
        ordered = torch.cat(parts, dim=1)
        keys = torch.empty_like(ordered)
        keys[:, self.order.long()] = ordered
        return keys

    def decode(self, dtype: torch.dtype) -> HeadKV:
        keys = self.keys_between(0, self.num_tokens)
        return keys.to(dtype), self._values(keys).to(dtype)

    def _values(self, like: Tensor) -> Tensor:
        ternary = like[:0] if self.values is None else self.values.decode().flatten(0, 1)
        if self.fine is None:
            return ternary
        values = torch.empty_like(like)
        chosen, others = self._places()
        values[chosen], values[others] = self.fine.decode(), ternary
        return values


def _others(chosen: Tensor, num_tokens: int) -> Tensor:
    rest = torch.ones(num_tokens, dtype=torch.bool, device=chosen.device)
    rest[chosen] = False
    return rest.nonzero()[:, 0]


def num_wide(head_dim: int, key_bits: float) -> int:
    """How many channels of a key have 2 bits."""
    return int(head_dim * (key_bits - 1))


def encode_head(keys: Tensor, values: Tensor, chosen: Tensor | None, *, key_bits: float, group: int) -> VidHead:
    """keys, values `[n, D]` fp32; chosen: the tokens whose values get 2 bits, ascending, a multiple of 64; None: none."""
    n, dim = keys.shape
    split = num_wide(dim, key_bits)
    order = (keys.amax(0) - keys.amin(0)).argsort(descending=True, stable=True)
    ordered = keys[:, order].unflatten(0, (-1, PAGE_TOKENS))  # [P, 64, D]
    wide, spectrum = ordered[:, :, :split].transpose(1, 2), None
    if split < dim:
        spectrum = (ordered[:, :, split:] @ fourier(dim - split)[0].to(keys)).transpose(1, 2)
    fine, ternary = None, values
    if chosen is not None and len(chosen):
        codes, minima = pack_columns(values[chosen].unflatten(0, (-1, PAGE_TOKENS)), bits=2, group=group)
        fine = FineValues(chosen=pack_kept([chosen], n), codes=codes, minima=minima)
        ternary = values[_others(chosen, n)]
    return VidHead(
        num_tokens=n,
        order=order.to(torch.int16),
        wide=pack_integers(wide, bits=2, group=group) if split else None,
        spectrum=None if spectrum is None else pack_signs(spectrum, group=group),
        values=pack_ternary(ternary.unflatten(0, (-1, PAGE_TOKENS)), group=group) if len(ternary) else None,
        fine=fine,
    )


def chunk_bytes(head_dim: int, *, key_bits: float, group: int) -> tuple[int, int]:
    """Bytes of 64 tokens of a head, with ternary values and with those of 2 bits."""
    wide, groups = num_wide(head_dim, key_bits), PAGE_TOKENS // group
    blocks = -(-head_dim // LANES)
    keys = code_bytes(wide, PAGE_TOKENS, 2) + code_bytes(head_dim - wide, PAGE_TOKENS, 1)
    keys += 2 * groups * (2 * wide + head_dim - wide)
    ternary = -(-PAGE_TOKENS // TRITS_PER_BYTE) * blocks * (LINE_BYTES // 4) + 2 * groups * blocks * LANES
    fine = code_bytes(PAGE_TOKENS, head_dim, 2) + 2 * groups * (blocks * LANES + head_dim)
    return keys + ternary, keys + fine


def text_relevance(hidden: Tensor, image_mask: Tensor) -> Tensor:
    """How much the text asks for each token: the mean of its products with text tokens, `[S]` fp32, from `[S, hidden]`."""
    text = hidden[~image_mask].float().mean(0)  # NaN without text
    return (hidden.float() @ text).nan_to_num(0.0)


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
    differs: ClassVar[str] = _DIFFERS
    page_format: ClassVar[None] = None
    chunk_tokens: ClassVar[int] = PAGE_TOKENS

    key_bits: float = 1.5
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        _check(self)

    @property
    def residual_tokens(self) -> int:
        return self.residual

    def encode(self, tokens: KeptTokens) -> Segment:
        """Each head with its own wide channels."""

        def head(_: int, keys: Tensor, values: Tensor) -> VidHead:
            return encode_head(keys, values, None, key_bits=self.key_bits, group=self.group)

        return PartsSegment.of(tokens, head)

    def bytes_bound(self, num_tokens: int, *, num_kv_heads: int, head_dim: int) -> int | None:
        """All bytes of the chunks, and the order of the channels."""
        ternary, _ = chunk_bytes(head_dim, key_bits=self.key_bits, group=self.group)
        return num_kv_heads * (-(-num_tokens // PAGE_TOKENS) * ternary + 2 * head_dim)


@final
@dataclass(frozen=True, kw_only=True)
class VidKVSTP:
    """`vidkv` with 2 bits for the values of image tokens that the text asks for (semantic token protection).

    Parameters
    ----------
    salient : float, default 0.2 of the image tokens of a head
        Share of the image tokens that are protected, in 64s, rounded down, but 64 where there are so many.
    key_bits, group, residual
        As in `vidkv`.

    Raises
    ------
    BadArgument
        If a value is none of these.
    """

    id: ClassVar[str] = "vidkv_stp"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "VidKV, semantic token protection"
    paper: ClassVar[str] = "Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2503.16257"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.IMAGE_MASK, Need.HIDDEN_STATES})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        _DIFFERS
        + " What the text asks for is told in every layer by what goes into its attention, not once by the input "
        "embeddings."
    )
    page_format: ClassVar[None] = None
    chunk_tokens: ClassVar[int] = PAGE_TOKENS

    salient: float = 0.2
    key_bits: float = 1.5
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        require_real("salient", self.salient, 0, 1)
        _check(self)

    @property
    def residual_tokens(self) -> int:
        return self.residual

    def _num_fine(self, num_images: int) -> int:
        wanted = max(PAGE_TOKENS, int(self.salient * num_images) // PAGE_TOKENS * PAGE_TOKENS) if self.salient else 0
        return min(wanted, num_images // PAGE_TOKENS * PAGE_TOKENS)

    def encode(self, tokens: KeptTokens) -> Segment:
        """Each head with its own wide channels and, of the prompt, the most relevant image tokens that it holds."""
        obs, relevance = tokens.observation, None
        if obs is not None:
            assert obs.hidden_states is not None, "declared in `needs`"
            assert obs.image_mask is not None, "declared in `needs`"
            relevance = text_relevance(obs.hidden_states, obs.image_mask).masked_fill(~obs.image_mask, -torch.inf)

        def head(h: int, keys: Tensor, values: Tensor) -> VidHead:
            chosen = None
            if obs is not None and relevance is not None:
                seen = relevance[obs.index_of(tokens.positions[h])]
                order = seen.argsort(descending=True, stable=True)  # ties go to the earlier token
                chosen = order[: self._num_fine(int((seen > -torch.inf).sum()))].sort().values
            return encode_head(keys, values, chosen, key_bits=self.key_bits, group=self.group)

        return PartsSegment.of(tokens, head)

    def bytes_bound(self, num_tokens: int, *, num_kv_heads: int, head_dim: int) -> int | None:
        """All tokens are image tokens; heads may each have a chunk that is protected beyond its share."""
        ternary, fine = chunk_bytes(head_dim, key_bits=self.key_bits, group=self.group)
        chunks = -(-num_tokens // PAGE_TOKENS)
        protected = min(chunks, 1 + ceil(self.salient * chunks)) if self.salient else 0
        bitmap = -(-num_tokens // 8) + 1
        return num_kv_heads * (chunks * ternary + protected * (fine - ternary) + bitmap + 2 * head_dim)


def _check(method: VidKV | VidKVSTP) -> None:
    require_real("key_bits", method.key_bits, 1, 2)
    require_choice("group", method.group, (16, 32, 64))
    require_multiple("residual", method.residual, PAGE_TOKENS)
