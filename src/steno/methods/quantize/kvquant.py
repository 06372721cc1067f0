"""KVQuant: keys before rotation, per channel, values per token, in a codebook fitted to them, with outliers kept apart.

Source: Hooper, Kim, Mohammadzadeh, Mahoney, Shao, Keutzer, Gholami, 2024, https://arxiv.org/abs/2401.18079, sections 3.1 to
    3.5.
Differs: without a calibration file channel thresholds are the quantiles of the tokens that are encoded together, and the
    codebooks are fitted to them by k-means without Fisher weights, one for the keys and one for the values of each KV head.
    With one, keys beyond their thresholds are kept apart up to the share of `outliers`, the farthest first, the others are
    cut, as in the authors' kernels, which have a fixed room for them. Outliers of values are those farthest from the middle of
    their token among all of the head, since 1 % of one head of one token is less than a number. 4 or 2 bits. No Q-Norm, and
    the first token is not kept apart.
Cost: without a file, k-means over at most 8192 numbers of a head when a chunk closes. Per step values are read as packed codes,
    and keys are opened and rotated 512 tokens at a time, as the rotation differs from token to token. Per value bits, 48
    bits for each outlier, 32 / n per key (n tokens encoded together), 32 / D per value. A table of
    levels takes 64 bytes: two for a layer with a file, without one two for each head and chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.parts import PartsSegment
from steno.cache.segment import HeadKV, Segment
from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.kernels.quant.codebooks import nearest_levels
from steno.kernels.quant.groups import MIN_SCALE, as_half
from steno.kernels.quant.matrices import Matrices, column_products, pack_levels, table_of
from steno.kernels.quant.packing import code_bytes
from steno.methods.checks import require_choice, require_multiple, require_real, require_text
from steno.methods.quantize.before_rope import held_positions, rotated
from steno.types import PAGE_TOKENS, KeptTokens, Need, Rope

BLOCK = 512
"""Tokens whose keys are opened at a time."""

SAMPLE = 8192
STEPS = 100
TAILS = (0.0, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
"""Shares of a channel beyond a threshold, at one end, for which a calibration file has thresholds."""
BITS = (4, 2)
TENSORS = ("key_low", "key_high", *(f"{side}_levels_{bits}" for side in ("key", "value") for bits in BITS))
"""Of a calibration file: thresholds before RoPE `[L, Hkv, D, tails]`, and codebooks `[L, 2**bits]`."""


def fit_levels(x: Tensor, bits: int, weights: Tensor | None = None) -> tuple[float, ...]:
    """The `2**bits` levels `[-1, 1]` of the quantizer with the least squared error on x `[n]`, by Lloyd's iteration.

    weights: `[n]` fp32 >= 0 of the errors, for all of x; None: all count alike, and at most 8192 of x are looked at.
    """
    x = x.flatten().nan_to_num(0.0).clamp(-1, 1)
    shares = (torch.arange(2**bits, device=x.device) + 0.5) / 2**bits
    if weights is None:
        x = x[:: max(1, x.numel() // SAMPLE)].contiguous()
        weights, levels = torch.ones_like(x), torch.quantile(x, shares)
    else:
        order = x.argsort()
        held = weights[order].double().cumsum(0)
        levels = x[order][torch.searchsorted(held, held[-1] * shares).clamp(max=len(x) - 1)]
    for _ in range(STEPS):
        cells = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        counts = torch.bincount(cells, weights, minlength=2**bits)
        sums = torch.zeros_like(levels).index_add_(0, cells, x * weights)
        levels = torch.where(counts > 0, sums / counts.clamp(min=1e-30), levels).sort().values
    return tuple(as_half(levels).tolist())


@final
@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What is fixed for a layer. key_ends: low and high `[2, Hkv, D]`, what is beyond is an outlier; levels: keys, values."""

    key_ends: Tensor
    key_levels: Tensor
    value_levels: Tensor


@lru_cache(maxsize=256)
def _fitted(low: Tensor, high: Tensor, key: Tensor, value: Tensor, layer_idx: int, tail: float) -> Fitted:
    """Of a layer, with thresholds for a share of `tail` at each end; a file's tensors are the same as long as it is."""
    above = next((i for i, t in enumerate(TAILS) if t >= tail), len(TAILS) - 1)
    below = max(0, above - 1)
    part = 0.0 if above == below else (tail - TAILS[below]) / (TAILS[above] - TAILS[below])
    ends = torch.stack([torch.lerp(x[layer_idx, ..., below], x[layer_idx, ..., above], part) for x in (low, high)])
    return Fitted(key_ends=ends, key_levels=table_of(key[layer_idx]), value_levels=table_of(value[layer_idx]))


def value_frame(values: Tensor, outliers: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which numbers of values `[n, D]` are outliers, `[n D]` bool, and the scale and middle `[n]` of the others of a token."""
    medians = values.median(1, keepdim=True).values
    far = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    far[(values - medians).abs().flatten().topk(int(outliers * values.numel()), sorted=False).indices] = True
    outside = far.view(values.shape)
    # where nothing is left of a token, its middle stands for it
    inside = torch.where(outside.all(1, keepdim=True), medians, values)
    hidden = outside & ~outside.all(1, keepdim=True)
    low, high = inside.masked_fill(hidden, torch.inf).amin(1), inside.masked_fill(hidden, -torch.inf).amax(1)  # [n]
    return far, as_half(((high - low) / 2).clamp(min=MIN_SCALE)), as_half((high + low) / 2)


@final
@dataclass(frozen=True, kw_only=True)
class Scattered:
    """Numbers of a matrix apart from it: flat places int32 `[m]`, and what they lie away from the matrix, fp16 `[m]`."""

    places: Tensor
    distances: Tensor

    @classmethod
    def of(cls, matrix: Tensor, approximated: Tensor, places: Tensor) -> Scattered:
        """After this the two agree at the places, up to fp16."""
        away = as_half((matrix - approximated).flatten()[places]).half()
        return cls(places=places.to(torch.int32), distances=away)

    def add_to(self, matrix: Tensor) -> Tensor:
        flat = matrix.flatten().index_add(0, self.places.long(), self.distances.to(matrix.dtype))
        return flat.view(matrix.shape)

    def column_products(self, x: Tensor, columns: int) -> Tensor:
        """x `[M, R]` times the sparse matrix, `[M, columns]`."""
        rows, column = self.places.long() // columns, self.places.long() % columns
        return x.new_zeros(len(x), columns).index_add_(1, column, x[:, rows] * self.distances.to(x.dtype))

    def between(self, first: int, end: int) -> Scattered:
        """Those at places from `first` to `end`, counted from `first`; the places ascend."""
        a, b = torch.searchsorted(self.places, self.places.new_tensor([first, end])).tolist()
        return Scattered(places=self.places[a:b] - first, distances=self.distances[a:b])


@final
@dataclass(frozen=True, kw_only=True)
class KVQuantHead:
    """One KV head. keys: matrices `[64, D]` of tokens before rotation, in units of `ranges` around `offsets` `[D]` fp16;
    values: `[64, D]` with a scale per token around `value_offsets` `[n]` fp16. positions: `[n]` int32, or the first of them
    where they follow each other; rope: what rotates keys."""

    keys: Matrices
    ranges: Tensor
    offsets: Tensor
    key_outliers: Scattered
    values: Matrices
    value_offsets: Tensor
    value_outliers: Scattered
    positions: Tensor | int
    rope: Rope | None

    @property
    def num_tokens(self) -> int:
        return self.keys.num_matrices * PAGE_TOKENS

    def keys_between(self, first: int, last: int) -> Tensor:
        dim = self.keys.columns
        plain = self.keys[first // PAGE_TOKENS : last // PAGE_TOKENS].decode().flatten(0, 1)
        plain = plain * self.ranges.float() + self.offsets.float()
        plain = self.key_outliers.between(first * dim, last * dim).add_to(plain)
        return rotated(plain, self.rope, self.positions, first)

    def logits(self, q: Tensor) -> Tensor:
        blocks = range(0, self.num_tokens, BLOCK)
        keys = (self.keys_between(i, min(i + BLOCK, self.num_tokens)) for i in blocks)
        return torch.cat([q @ k.to(q.dtype).T for k in keys], dim=1)

    def mix(self, weights: Tensor) -> Tensor:
        outliers = self.value_outliers.column_products(weights, self.values.columns)
        offsets = weights @ self.value_offsets.to(weights.dtype)
        return column_products(weights, self.values) + outliers + offsets[:, None]

    def decode(self, dtype: torch.dtype) -> HeadKV:
        keys = self.keys_between(0, self.num_tokens)
        values = self.values.decode().flatten(0, 1) + self.value_offsets.float()[:, None]
        return keys.to(dtype), self.value_outliers.add_to(values).to(dtype)


@final
@dataclass(frozen=True, kw_only=True)
class KVQuant:
    """Fitted codebooks and outliers, keys before rotation.

    Parameters
    ----------
    bits : int, default 4 bits
        4 or 2, of keys and values.
    outliers : float, default 0.01
        Share of the numbers that are kept apart.
    residual : int, default 128 tokens
        Later tokens are encoded when there are so many; a multiple of 64.
    statistics : str or None, default None
        A file of `steno calibrate kvquant` with thresholds and codebooks. None: that of this model where there is one, else
        they are fitted to the tokens that are encoded together.

    Raises
    ------
    BadArgument
        If a value is none of these.
    CalibrationError
        When tokens are encoded, if the file of `statistics` cannot be used.
    """

    id: ClassVar[str] = "kvquant"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "KVQuant"
    paper: ClassVar[str] = "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2401.18079"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ROPE})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Without a calibration file thresholds and codebooks are fitted to the tokens that are encoded together; outliers of "
        "keys have a fixed room, those of values are chosen over a whole head; 4 or 2 bits; no Q-Norm."
    )
    page_format: ClassVar[None] = None

    bits: int = 4
    outliers: float = 0.01
    residual: int = 128

    statistics: str | None = None

    def __post_init__(self) -> None:
        require_choice("bits", self.bits, BITS)
        require_real("outliers", self.outliers, 0, 1)
        require_multiple("residual", self.residual, PAGE_TOKENS)
        if self.statistics is not None:
            require_text("statistics", self.statistics)

    @property
    def residual_tokens(self) -> int:
        return self.residual

    @property
    def chunk_tokens(self) -> int:
        return PAGE_TOKENS

    def encode(self, tokens: KeptTokens) -> Segment:
        """Each head with thresholds and codebooks of the file, or of its own."""
        fitted = None if self.statistics is None else self._of_layer(self.statistics, tokens)

        def head(h: int, keys: Tensor, values: Tensor) -> KVQuantHead:
            return self._head(h, keys, values, tokens.positions[h], tokens.rope, fitted)

        return PartsSegment.of(tokens, head)

    def _of_layer(self, path: str, tokens: KeptTokens) -> Fitted:
        found = load_calibration(path, TENSORS)
        wanted = [tokens.num_layers, len(tokens.keys), tokens.keys[0].shape[1], len(TAILS)]
        levels = [found[f"{side}_levels_{self.bits}"] for side in ("key", "value")]
        sizes = [list(x.shape) for x in levels]
        if any(list(found[name].shape) != wanted for name in ("key_low", "key_high")) or any(
            size != [tokens.num_layers, 2**self.bits] for size in sizes
        ):
            raise CalibrationError(
                f"the thresholds of {path} must be those of this model, {wanted}; got {list(found['key_low'].shape)}, and "
                f"codebooks of {sizes}: calibrate on this model."
            )
        return _fitted(found["key_low"], found["key_high"], *levels, tokens.layer_idx, self.outliers / 2)

    def _key_frame(self, plain: Tensor) -> Tensor:
        """The ends of each channel, `[2, D]`, half of the outliers beyond each."""
        count = min(int(self.outliers / 2 * len(plain) + 0.5), (len(plain) - 1) // 2)
        ordered = plain.sort(0).values
        return torch.stack([ordered[count], ordered[len(plain) - 1 - count]])

    def _key_outliers(self, plain: Tensor, ends: Tensor, ranges: Tensor, limit: int | None) -> Tensor:
        """Places of keys `[n, D]` beyond their ends `[2, D]`, ascending; limit: so many, the farthest."""
        beyond = torch.maximum(ends[0] - plain, plain - ends[1])
        places = (beyond > 0).flatten().nonzero()[:, 0]
        if limit is None or len(places) <= limit:
            return places
        order = (beyond / ranges).flatten()[places].argsort(descending=True, stable=True)
        return places[order[:limit]].sort().values

    def _head(
        self, h: int, keys: Tensor, values: Tensor, positions: Tensor, rope: Rope | None, fitted: Fitted | None
    ) -> KVQuantHead:
        """keys, values `[n, D]` fp32, of head h."""
        plain = keys if rope is None else rope.undo(keys, positions)
        ends = self._key_frame(plain) if fitted is None else fitted.key_ends[:, h].to(plain.device)
        ranges, offsets = as_half(((ends[1] - ends[0]) / 2).clamp(min=MIN_SCALE)), as_half((ends[1] + ends[0]) / 2)
        packed = _pack((plain - offsets) / ranges, None, self.bits, None if fitted is None else fitted.key_levels)
        decoded = packed.decode().flatten(0, 1) * ranges + offsets
        limit = None if fitted is None else int(self.outliers * plain.numel())
        outside = self._key_outliers(plain, ends, ranges, limit)

        far, scales, middles = value_frame(values, self.outliers)
        normal = (values - middles[:, None]) / scales[:, None]
        value_packed = _pack(normal, scales, self.bits, None if fitted is None else fitted.value_levels)
        value_decoded = value_packed.decode().flatten(0, 1) + middles[:, None]

        return KVQuantHead(
            keys=packed,
            ranges=ranges.half(),
            offsets=offsets.half(),
            key_outliers=Scattered.of(plain, decoded, outside),
            values=value_packed,
            value_offsets=middles.half(),
            value_outliers=Scattered.of(values, value_decoded, far.nonzero()[:, 0]),
            positions=held_positions(positions),
            rope=rope,
        )

    def bytes_bound(self, num_tokens: int, *, num_kv_heads: int, head_dim: int) -> int | None:
        """Codes, levels, thresholds, scales, positions and outliers."""
        codes = 2 * -(-num_tokens // PAGE_TOKENS) * code_bytes(PAGE_TOKENS, head_dim, self.bits)
        tables = 4 * head_dim + 4 * num_tokens + 4 * num_tokens + 2 * 64
        key_outliers = head_dim * (self.outliers * num_tokens + 2) * 6
        return num_kv_heads * int(codes + tables + key_outliers + self.outliers * num_tokens * head_dim * 6 + 8)


def _pack(normal: Tensor, scales: Tensor | None, bits: int, levels: Tensor | None) -> Matrices:
    """Numbers `[n, D]`, of which those in [-1, 1] count, in these levels or those that fit best; scales `[n]` or None.

    levels: a table `[16]`, of `2**bits`.
    """
    if levels is None:
        inside = normal[normal.abs() <= 1]
        levels = table_of(torch.tensor(fit_levels(inside, bits) if len(inside) else (0.0,) * 2**bits))
    codes = nearest_levels(normal.nan_to_num(0.0), levels[: 2**bits].to(normal)).to(torch.uint8)
    pages = codes.unflatten(0, (-1, PAGE_TOKENS))  # [P, 64, D]
    params = None if scales is None else scales.half().view(len(pages), 1, PAGE_TOKENS)
    return pack_levels(pages, bits=bits, levels=levels, scales=params)
