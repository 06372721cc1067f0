"""xKV: neighbouring layers see their tokens along the same directions, so they share one short vector per token.

Source: Chang, Lin, Lin, Chiang, Akhauri, Dai, Liu, Ceze, Abdelfattah, Wu, 2025, https://arxiv.org/abs/2503.18893, section 3;
    the authors' code.
Differs: bytes are really freed (the authors' code multiplies the factors back); ranks are shares of the width of a group,
    those of the paper's Llama-3.1-8B; layers of a group and their heads keep the same tokens; the weights on values meet the
    short vectors first; the SVD is that of the smaller Gram matrix, in fp32, which squares: what is smaller than the largest
    by more than the root of its precision is lost.
Cost: an eigendecomposition of min(n, G Hkv D) once per group and prompt; per step, layer and token 2 Hkv D r FLOPs to restore
    keys, tile by tile, since each token is rotated by another angle; values are
    never restored, nor opened from codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.latent import LatentSegment, LowRankBasis
from steno.cache.policy import Store, StoreBytes
from steno.cache.segment import Segment
from steno.methods.checks import require_int, require_real
from steno.types import KeptTokens, Need, Widths


@final
@dataclass(frozen=True, kw_only=True)
class XKV:
    """One SVD of the keys before RoPE, and one of the values, for a group of layers.

    Parameters
    ----------
    layers : int, default 4
        Neighbouring layers in a group; the last group may be smaller, and a last layer alone stays as it is.
    key_share : float, default 0.125
        Rank for keys, as a share of the channels of all heads of all layers of a group.
    value_share : float, default 0.1875
        The same for values.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    """

    id: ClassVar[str] = "xkv"
    kind: ClassVar[str] = "share"
    title: ClassVar[str] = "xKV"
    paper: ClassVar[str] = "xKV: Cross-Layer SVD for KV-Cache Compression"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2503.18893"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ROPE})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Bytes are really freed; ranks are shares of a group's width instead of the numbers of one model; layers of a group "
        "and their heads keep the same tokens."
    )

    layers: int = 4
    key_share: float = 0.125
    value_share: float = 0.1875

    def __post_init__(self) -> None:
        require_int("layers", self.layers, 2)
        require_real("key_share", self.key_share, 0, 1)
        require_real("value_share", self.value_share, 0, 1)

    def group(self, layer_idx: int, num_layers: int) -> range:
        first = layer_idx // self.layers * self.layers
        return range(first, min(first + self.layers, num_layers))

    def _ranks(self, width: int) -> tuple[int, int]:
        return max(1, round(width * self.key_share)), max(1, round(width * self.value_share))

    def stored(self, widths: Widths, num_sharing: int) -> Widths:
        """A short vector for all heads of all layers of the group."""
        keys, values = self._ranks(num_sharing * widths.heads * widths.keys)
        return Widths(heads=1, keys=keys, values=values)

    def fixed_bytes(self, widths: Widths, num_layers: int, number_bytes: int) -> int:
        """A layer's own factors, and the frequencies of RoPE."""
        channels = widths.heads * widths.keys
        return channels * sum(self._ranks(min(self.layers, num_layers) * channels)) * number_bytes + 2 * widths.keys

    def shared_bytes(self, num_tokens: int, widths: Widths, num_sharing: int, store: StoreBytes) -> int:
        """A layer's own factors, of no more ranks than tokens, and its part of the short vectors and of their positions."""
        channels = widths.heads * widths.keys
        whole = self.stored(widths, num_sharing)
        keys, values = min(whole.keys, num_tokens), min(whole.values, num_tokens)
        common = store.stored_bytes(num_tokens, Widths(heads=1, keys=keys, values=values)) + 4 * num_tokens
        return -(-common // num_sharing) + channels * (keys + values) * store.number_bytes + 2 * widths.keys

    def share(self, layers: Sequence[KeptTokens], store: Store) -> list[Segment]:
        """Segments with the short vectors of the group in common, each with the factors of its own layer."""
        first = layers[0]
        positions = first.positions[0]
        keys = [torch.stack(layer.keys) for layer in layers]  # [Hkv, n, D] each
        plain = [
            k if layer.rope is None else layer.rope.undo(k, positions) for k, layer in zip(keys, layers, strict=True)
        ]
        key_rank, value_rank = self._ranks(len(layers) * keys[0].shape[0] * keys[0].shape[2])
        short_keys, key_factors = _factors([_wide(k) for k in plain], key_rank)
        short_values, value_factors = _factors([_wide(torch.stack(layer.values)) for layer in layers], value_rank)
        dtype = keys[0].dtype
        inner = store.store(
            replace(
                first, keys=[short_keys.to(dtype)], values=[short_values.to(dtype)], positions=[positions], rope=None
            )
        )
        where = positions.to(torch.int32, copy=True)
        return [
            LatentSegment(
                inner=inner,
                basis=LowRankBasis(
                    key_directions=k[None].to(dtype), value_directions=v[None].to(dtype), head_dim=keys[0].shape[2]
                ),
                positions=where,
                rope=layer.rope,
            )
            for k, v, layer in zip(key_factors, value_factors, layers, strict=True)
        ]


def _wide(x: Tensor) -> Tensor:
    """`[Hkv, n, D]` to `[n, Hkv * D]`."""
    return x.transpose(0, 1).flatten(1)


def _factors(layers: Sequence[Tensor], rank: int) -> tuple[Tensor, list[Tensor]]:
    """The truncated SVD of `[n, C]` of every layer side by side: short vectors `[n, r]` and factors `[C, r]` per layer, fp32."""
    whole = torch.cat(list(layers), dim=1).float()  # [n, G * C]
    rank = min(rank, *whole.shape)
    if whole.shape[0] < whole.shape[1]:
        _, left = torch.linalg.eigh(whole @ whole.mT)
        directions = whole.mT @ left.flip(1)[:, :rank]
        directions = torch.linalg.qr(directions).Q  # the same span, orthonormal where singular values vanish too
    else:
        _, right = torch.linalg.eigh(whole.mT @ whole)
        directions = right.flip(1)[:, :rank]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    factors = directions.contiguous()
    return whole @ factors, [part.clone() for part in factors.split(layers[0].shape[1])]
