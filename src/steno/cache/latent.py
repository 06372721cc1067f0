"""Segments of latents: keys that were taken back before RoPE and mapped across heads, restored tile by tile to attend.

Values are never restored: the weights of the heads meet the latents, in whatever form those are held.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from steno.cache.segment import TILE_TOKENS, HeadKV, Segment
from steno.cache.transformed import Basis
from steno.types import KeptTokens, Rope


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

    def _restored(self, latents: Tensor, positions: Tensor) -> Tensor:
        """Keys `[Hkv, n, D]` from `[Hl, n, rk]`."""
        keys = self.basis.whole_keys(latents)
        return keys if self.rope is None else self.rope.apply(keys, positions)

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        keys, values = (torch.stack(x) for x in zip(*self.inner.decode(dtype), strict=True))
        values = values.repeat_interleave(self.basis.num_kv_heads // len(values), dim=0)
        return list(zip(self._restored(keys, self.positions), self.basis.outputs(values), strict=True))

    def key_tiles(self, num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
        first = 0
        for latents in self.inner.key_tiles(num_tokens, dtype):
            last = first + latents.shape[1]
            yield self._restored(latents, self.positions[first:last])
            first = last

    def products(self, q: Tensor) -> list[Tensor]:
        # RoPE turns the keys of each token by another angle, so no one vector among the latents stands for a query
        return list(torch.cat([q @ keys.mT for keys in self.key_tiles(TILE_TOKENS, q.dtype)], dim=2))

    def mix(self, weights: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(weights))  # [Hkv, M, n]
        of_latents = stacked.unflatten(0, (len(self.inner.lengths), -1))  # [Hl, Hkv / Hl, M, n]
        mixed = self.inner.mix(list(of_latents.flatten(1, 2))).unflatten(1, of_latents.shape[1:3])
        return self.basis.outputs(mixed.flatten(0, 1))

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
