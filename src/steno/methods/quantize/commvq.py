"""CommVQ: keys before RoPE as sums of codewords that commute with it, values as sums of the rows that a few bits turn on.

A key of D numbers is D / 2 complex ones, which RoPE turns. A codeword is a + ib, a and b two of 64 centres of its stage, so 12
bits name it, and turning a codeword is turning its centres. A value is z E with bits z and a matrix E, scaled to its length.

Source: Li, Zhang, Hassan, Chafekar, Cai, Ren, Guo, Karimzadeh, Reed, Wang, Gan, 2025, https://arxiv.org/abs/2506.18879; the
    authors' code (UMass-Embodied-AGI/CommVQ).
Differs: the bits of values are found by descent from bit to bit, where the paper trains an encoder of millions of weights a
    layer, and E is fitted to values by least squares, not through the model; each KV head has its own E, with a row that is
    always on, and its own lengths, where those of the paper run over all heads. Centres are fitted by k-means in place of
    an annealed EM. Encoding draws nothing. Codebooks belong to the model, as its weights do: they are not bytes of the cache.
Cost: per token and head 64 D + 4096 additions a stage to encode a key, about 4 m D FLOPs a value of m bits. Per step the sum of
    2 R centres of D numbers for each token, 512 tokens at a time; values are read as bits, and multiplied by E once. With
    R = b D / 12 stages b bits a number, and 16 / D for the lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from steno.cache.parts import PartsSegment
from steno.cache.segment import HeadKV, Segment
from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.kernels.quant.groups import as_half
from steno.kernels.quant.matrices import Matrices, column_products, pack_levels
from steno.kernels.quant.packing import code_bytes
from steno.methods.checks import require_choice, require_multiple, require_text
from steno.methods.quantize.before_rope import held_positions, rotated
from steno.types import PAGE_TOKENS, KeptTokens, Need, Rope

CENTRES = 64
STAGE_BITS = 12
BITS = (2, 1)
TENSORS = ("key_centres", *(f"value_rows_{bits}" for bits in BITS))
"""Of a calibration file: `[L, Hkv, R, 64, D]`, real parts then imaginary ones, R for 2 bits; `[L, Hkv, b D + 1, D]`."""
BLOCK = 512
"""Tokens whose keys are compared with all codewords, or opened, at a time."""
SWEEPS = 2


def num_stages(head_dim: int, bits: int) -> int:
    """Codewords of a key: as many as `bits` a number pay for, at least one."""
    return max(1, bits * head_dim // STAGE_BITS)


def turned(centres: Tensor) -> Tensor:
    """i times what `[..., D]`, real parts then imaginary ones, stands for."""
    real, imaginary = centres.chunk(2, dim=-1)
    return torch.cat([-imaginary, real], dim=-1)


def nearest_codewords(x: Tensor, centres: Tensor) -> Tensor:
    """The codeword a + ib nearest to each x `[n, D]` as 64 a + b, `[n]` int64, of centres `[64, D]`."""
    other = turned(centres)
    norms = centres.square().sum(1)
    lengths = norms[:, None] + norms + 2 * centres @ other.T  # [a, b], squared
    found = []
    for part in x.split(BLOCK):
        first, second = 2 * centres @ part.T, 2 * other @ part.T  # [64, n]
        rest = torch.stack([(row[:, None] - second).amin(0) for row in lengths])  # [a, n], with its best b
        a = (rest - first).argmin(0)
        found.append(CENTRES * a + (lengths[a] - second.T).argmin(1))
    return torch.cat(found) if found else x.new_zeros(0, dtype=torch.int64)


def codeword(codes: Tensor, centres: Tensor) -> Tensor:
    """`[n, D]` from `[n]`."""
    return centres[codes // CENTRES] + turned(centres)[codes % CENTRES]


def encode_keys(x: Tensor, centres: Tensor) -> Tensor:
    """Codes `[n, R]` of x `[n, D]`: each stage `[64, D]` of centres takes what those before it left."""
    codes = []
    for stage in centres:
        codes.append(nearest_codewords(x, stage))
        x = x - codeword(codes[-1], stage)
    return torch.stack(codes, dim=1)


def decode_keys(codes: Tensor, centres: Tensor) -> Tensor:
    """Sums of codewords `[n, D]`."""
    stages = CENTRES * torch.arange(len(centres), device=codes.device)
    first, second = codes // CENTRES + stages, codes % CENTRES + stages + CENTRES * len(centres)
    table = torch.cat([centres.flatten(0, 1), turned(centres).flatten(0, 1)])  # [2 * R * 64, D]
    return embedding_bag(torch.cat([first, second], dim=1), table, mode="sum")


def pack_codes(codes: Tensor) -> Tensor:
    """Two codes of 12 bits in three bytes: `[n, R]` to uint8 `[n, 3 * ceil(R / 2)]`."""
    low, high = pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(2)
    return torch.stack([low & 255, low >> 8 | (high & 15) << 4, high >> 4], dim=2).flatten(1).to(torch.uint8)


def unpack_codes(packed: Tensor, count: int) -> Tensor:
    """`[n, count]` int64 behind `pack_codes`."""
    first, middle, last = packed.long().unflatten(1, (-1, 3)).unbind(2)
    return torch.stack([first | (middle & 15) << 8, middle >> 4 | last << 4], dim=2).flatten(1)[:, :count]


def encode_bits(x: Tensor, rows: Tensor, start: Tensor | None = None, *, sweeps: int = SWEEPS) -> Tensor:
    """Bits `[..., n, m]` bool, which rows of `[..., m + 1, D]` come near x `[..., n, D]`, the last one being always on.

    A bit is turned over where that brings the sum nearer, one after the other, `sweeps` times. start: bits to begin with.
    """
    basis, always = rows[..., :-1, :], rows[..., -1:, :]
    if start is None:
        start = (x - always) @ torch.linalg.pinv(basis) > 0.5
    bits = start.clone()
    rest = x - always - bits.to(x.dtype) @ basis
    norms = basis.square().sum(-1)  # [..., m]
    for _ in range(sweeps):
        for i in range(basis.shape[-2]):
            row = basis[..., i, :, None]  # [..., D, 1]
            step = 1 - 2 * bits[..., i, None].to(x.dtype)  # [..., n, 1]
            change = 2 * step * (rest @ row) > norms[..., i, None, None]
            rest = rest - torch.where(change, step, 0.0) @ row.mT
            bits[..., i] ^= change[..., 0]
    return bits


@final
@dataclass(frozen=True, kw_only=True)
class Books:
    """The codebooks of one KV head: centres `[R, 64, D]`, rows `[m + 1, D]`, fp32."""

    centres: Tensor
    rows: Tensor


def books_of(path: str, layer_idx: int, head: int, bits: int) -> Books:
    """As they lie in the file, which is read once; views."""
    found = load_calibration(path, TENSORS)
    centres, rows = found["key_centres"][layer_idx, head], found[f"value_rows_{bits}"][layer_idx, head]
    return Books(centres=centres[: num_stages(centres.shape[2], bits)], rows=rows)


@final
@dataclass(frozen=True, kw_only=True)
class CommVQHead:
    """One KV head. codes: `pack_codes` of keys before RoPE; lengths: `[n]` fp16; values: bits `[64, m]` with a scale per token.

    positions and rope as in `before_rope`. The codebooks are those of `path`, for this layer and head.
    """

    codes: Tensor
    lengths: Tensor
    values: Matrices
    positions: Tensor | int
    rope: Rope | None
    path: str
    layer_idx: int
    head: int
    bits: int

    @property
    def num_tokens(self) -> int:
        return len(self.codes)

    def _books(self) -> Books:
        return books_of(self.path, self.layer_idx, self.head, self.bits)

    def keys_between(self, first: int, last: int) -> Tensor:
        centres = self._books().centres
        codes = unpack_codes(self.codes[first:last], len(centres))
        plain = decode_keys(codes, centres.to(codes.device)) * self.lengths[first:last].float()[:, None]
        return rotated(plain, self.rope, self.positions, first)

    def logits(self, q: Tensor) -> Tensor:
        blocks = range(0, self.num_tokens, BLOCK)
        keys = (self.keys_between(i, min(i + BLOCK, self.num_tokens)) for i in blocks)
        return torch.cat([q @ k.to(q.dtype).T for k in keys], dim=1)

    def mix(self, weights: Tensor) -> Tensor:
        scales = self._scales().to(weights.dtype)
        on = torch.cat([column_products(weights, self.values), weights @ scales[:, None]], dim=1)  # [M, m + 1]
        return on @ self._books().rows.to(on)

    def _scales(self) -> Tensor:
        """Of each token's value, `[n]`."""
        assert self.values.params is not None
        return self.values.params.flatten()

    def decode(self, dtype: torch.dtype) -> HeadKV:
        books, scales = self._books(), self._scales().float()[:, None]
        keys = self.keys_between(0, self.num_tokens)
        on = torch.cat([self.values.decode().flatten(0, 1), scales], dim=1)
        return keys.to(dtype), (on @ books.rows.to(on)).to(dtype)


@final
@dataclass(frozen=True, kw_only=True)
class CommVQ:
    """Codebooks of the model in place of scales and minima.

    Parameters
    ----------
    bits : int, default 2 bits
        2 or 1, of a number.
    residual : int, default 128 tokens
        Later tokens are encoded when there are so many; a multiple of 64.
    weights : str or None, default None
        The file of `steno calibrate commvq` with the codebooks. None: the one for this model.

    Raises
    ------
    BadArgument
        If a value is none of these.
    CalibrationError
        When tokens are encoded, if there is no such file or it is not that of this model.
    """

    id: ClassVar[str] = "commvq"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "CommVQ"
    paper: ClassVar[str] = "CommVQ: Commutative Vector Quantization for KV Cache Compression"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2506.18879"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ROPE})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Bits of values are found by descent instead of a trained encoder, and their matrix by least squares instead of "
        "through the model; each KV head has its own matrix and lengths; centres are fitted by k-means. Codebooks belong to "
        "the model and are no bytes of the cache."
    )
    page_format: ClassVar[None] = None
    chunk_tokens: ClassVar[int] = PAGE_TOKENS

    bits: int = 2
    residual: int = 128
    weights: str | None = None

    def __post_init__(self) -> None:
        require_choice("bits", self.bits, BITS)
        require_multiple("residual", self.residual, PAGE_TOKENS)
        if self.weights is not None:
            require_text("weights", self.weights)

    @property
    def residual_tokens(self) -> int:
        return self.residual

    def encode(self, tokens: KeptTokens) -> Segment:
        """Each head with the codebooks of this layer."""
        path = self._checked(tokens)

        def head(h: int, keys: Tensor, values: Tensor) -> CommVQHead:
            books = books_of(path, tokens.layer_idx, h, self.bits)
            positions, rope = tokens.positions[h], tokens.rope
            plain = keys if rope is None else rope.undo(keys, positions)
            lengths = as_half(plain.norm(dim=1))
            codes = encode_keys(plain / lengths.clamp(min=1e-7)[:, None], books.centres.to(plain))
            return CommVQHead(
                codes=pack_codes(codes),
                lengths=lengths.half(),
                values=_pack_values(values, books.rows.to(values)),
                positions=held_positions(positions),
                rope=rope,
                path=path,
                layer_idx=tokens.layer_idx,
                head=h,
                bits=self.bits,
            )

        return PartsSegment.of(tokens, head)

    def _checked(self, tokens: KeptTokens) -> str:
        """The file, if its codebooks are those of this model."""
        if self.weights is None:
            raise CalibrationError(
                "commvq needs codebooks of this model: run `steno calibrate commvq --model M` once and name its file, "
                "commvq(weights='FILE'), or read with steno.load(...).read(...), which finds it."
            )
        found = load_calibration(self.weights, TENSORS)
        heads, dim = len(tokens.keys), tokens.keys[0].shape[1]
        wanted = [[tokens.num_layers, heads, num_stages(dim, 2), CENTRES, dim]]
        wanted += [[tokens.num_layers, heads, bits * dim + 1, dim] for bits in BITS]
        got = [list(found[name].shape) for name in TENSORS]
        if got != wanted:
            raise CalibrationError(
                f"the codebooks of {self.weights} must be those of this model, {wanted}; got {got}: calibrate on this model."
            )
        return self.weights

    def bytes_bound(self, num_tokens: int, *, num_kv_heads: int, head_dim: int) -> int | None:
        """Codes, lengths, positions, bits, scales and the frequencies of RoPE; codebooks belong to the model."""
        codes = 3 * -(-num_stages(head_dim, self.bits) // 2)
        bits = -(-num_tokens // PAGE_TOKENS) * code_bytes(PAGE_TOKENS, self.bits * head_dim, 1)
        return num_kv_heads * (num_tokens * (codes + 2 + 4 + 2) + bits) + 2 * head_dim


def _pack_values(values: Tensor, rows: Tensor) -> Matrices:
    """Values `[n, D]` fp32 as bits, and the scale that gives each its length."""
    lengths = values.norm(dim=1)
    bits = encode_bits(values / lengths.clamp(min=1e-7)[:, None], rows)
    sums = (bits.to(rows.dtype) @ rows[:-1] + rows[-1]).norm(dim=1)
    scales = as_half(lengths / sums.clamp(min=1e-7)).half()
    pages = bits.to(torch.uint8).unflatten(0, (-1, PAGE_TOKENS))  # [P, 64, m]
    return pack_levels(pages, bits=1, levels=(0.0, 1.0), scales=scales.view(len(pages), 1, PAGE_TOKENS))
