"""Segments of latents: keys that were taken back before RoPE and mapped across heads, restored tile by tile to attend."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from steno.cache.segment import HeadKV, Segment
from steno.cache.transformed import Basis
from steno.kernels.attention import merge_attention, softmax_over
from steno.types import KeptTokens, Rope

TILE_TOKENS = 1024
"""Tokens whose keys are restored at a time, so that the whole is never dense."""


class LatentBasis(Basis):
    """A basis of all heads of a token together, before RoPE.

    Latents are `[Hl, n, rk]` for keys and `[Hl, n, rv]` for values; KV head h lies in latent `h * Hl // Hkv`.
    """

    @abstractmethod
    def latent_keys(self, k: Tensor) -> Tensor:
        """Keys before RoPE `[Hkv, n, D]` to `[Hl, n, rk]`."""

    @abstractmethod
    def whole_keys(self, latents: Tensor) -> Tensor:
        """`[Hl, n, rk]` to keys before RoPE `[Hkv, n, D]`."""

    @abstractmethod
    def latent_values(self, v: Tensor) -> Tensor:
        """Values `[Hkv, n, D]` to `[Hl, n, rv]`."""

    @abstractmethod
    def outputs(self, o: Tensor) -> Tensor:
        """What each head made of latent values, `[Hkv, n, rv]`, to `[Hkv, n, D]`; linear."""

    @property
    @abstractmethod
    def num_kv_heads(self) -> int: ...

    def change(self, tokens: KeptTokens) -> KeptTokens:
        positions = tokens.positions[0]
        keys, values = torch.stack(tokens.keys), torch.stack(tokens.values)  # heads keep the same tokens
        plain = keys if tokens.rope is None else tokens.rope.undo(keys, positions)
        latent_keys, latent_values = self.latent_keys(plain), self.latent_values(values)
        where = [positions] * len(latent_keys)
        return replace(tokens, keys=list(latent_keys), values=list(latent_values), positions=where, rope=None)

    def wrap(self, inner: Segment, tokens: KeptTokens) -> Segment:
        positions = tokens.positions[0].to(torch.int32, copy=True)
        return LatentSegment(inner=inner, basis=self, positions=positions, rope=tokens.rope)


@final
@dataclass(frozen=True, kw_only=True)
class LatentSegment(Segment):
    """Latents held by `inner`, of tokens at `positions` `[n]` int32 in every head. rope: None where there is none."""

    inner: Segment
    basis: LatentBasis
    positions: Tensor
    rope: Rope | None

    @property
    def lengths(self) -> tuple[int, ...]:
        return (len(self.positions),) * self.basis.num_kv_heads

    def _restored(self, heads: Sequence[HeadKV], positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[Hkv, n, D]` and, for each head its latent, values `[Hkv, n, rv]`."""
        keys = self.basis.whole_keys(torch.stack([k for k, _ in heads]))
        keys = keys if self.rope is None else self.rope.apply(keys, positions)
        values = torch.stack([v for _, v in heads])
        return keys, values.repeat_interleave(self.basis.num_kv_heads // len(heads), dim=0)

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        keys, values = self._restored(self.inner.decode(dtype), self.positions)
        return list(zip(keys, self.basis.outputs(values), strict=True))

    def attend(self, q: Tensor, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        num_heads = self.basis.num_kv_heads
        grouped = q.to(dtype).unflatten(0, (num_heads, -1))  # [Hkv, G, T, D]
        flat = grouped.flatten(1, 2)
        parts, first = [], 0
        for heads in self.inner.tiles(TILE_TOKENS, dtype):
            last = first + len(heads[0][0])
            keys, values = self._restored(heads, self.positions[first:last])
            parts.append(softmax_over(flat @ keys.mT, values, scale=scale, softcap=softcap))
            first = last
        out, lse = merge_attention([out for out, _ in parts], [lse for _, lse in parts])
        out = self.basis.outputs(out).unflatten(1, grouped.shape[1:3]).flatten(0, 1)  # [H, T, D]
        return out.to(q.dtype), lse.unflatten(1, grouped.shape[1:3]).flatten(0, 1).float()

    def prefix(self, lengths: Sequence[int], dtype: torch.dtype) -> list[Segment]:
        [length] = set(lengths)
        parts, first = [], 0
        for part in self.inner.prefix([length] * len(self.inner.lengths), dtype):
            last = first + part.lengths[0]
            parts.append(replace(self, inner=part, positions=self.positions[first:last].clone()))
            first = last
        return list(parts)

    def joined(self, later: Segment) -> Segment | None:
        if not isinstance(later, LatentSegment) or later.basis is not self.basis:
            return None
        inner = self.inner.joined(later.inner)
        if inner is None:
            return None
        return replace(self, inner=inner, positions=torch.cat([self.positions, later.positions]))


@final
@dataclass(frozen=True, kw_only=True)
class LowRankBasis(LatentBasis):
    """Projections of groups of neighbouring heads onto a few directions, orthonormal in each group.

    key_directions: `[Hl, g * D, rk]`, value_directions: `[Hl, g * D, rv]`, of Hl groups of g heads, in the
    dtype of the tokens.
    """

    key_directions: Tensor
    value_directions: Tensor
    head_dim: int

    @property
    def num_kv_heads(self) -> int:
        return self.key_directions.shape[0] * self.key_directions.shape[1] // self.head_dim

    def latent_keys(self, k: Tensor) -> Tensor:
        return _project(_side_by_side(k, len(self.key_directions)), self.key_directions)

    def latent_values(self, v: Tensor) -> Tensor:
        return _project(_side_by_side(v, len(self.value_directions)), self.value_directions)

    def whole_keys(self, latents: Tensor) -> Tensor:
        whole = _project(latents, self.key_directions.mT)  # [Hl, n, g * D]
        return whole.unflatten(2, (-1, self.head_dim)).transpose(1, 2).flatten(0, 1)

    def outputs(self, o: Tensor) -> Tensor:
        up = self.value_directions.unflatten(1, (-1, self.head_dim)).flatten(0, 1).mT  # [Hkv, rv, D]
        return _project(o, up)


def _side_by_side(x: Tensor, num_groups: int) -> Tensor:
    """`[Hkv, n, D]` to `[Hl, n, g * D]`."""
    return x.unflatten(0, (num_groups, -1)).transpose(1, 2).flatten(2)


def _project(x: Tensor, matrix: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, matrix.dtype)
    return (x.to(compute) @ matrix.to(compute)).to(x.dtype)


def principal_directions(moment: Tensor, num_groups: int, rank: int) -> Tensor:
    """The `rank` directions `[Hl, C / Hl, rank]` fp32 that hold most of the second moment `[C, C]`, in each group of channels.

    Signs are fixed, so that the same moment gives the same directions.
    """
    width = moment.shape[0] // num_groups
    blocks = torch.stack([moment[i : i + width, i : i + width] for i in range(0, len(moment), width)])
    _, vectors = torch.linalg.eigh(blocks.double())
    directions = vectors.flip(2)[:, :, :rank]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return (directions * torch.where(largest < 0, -1.0, 1.0)).float().contiguous()


def second_moment(heads: Sequence[Tensor]) -> Tensor:
    """The second moment `[C, C]` fp32 of tokens `[n, D]` of every head, heads side by side."""
    flat = torch.cat(list(heads), dim=1).float()  # [n, C]
    return flat.mT @ flat / max(1, len(flat))
