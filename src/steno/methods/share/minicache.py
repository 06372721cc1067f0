"""MiniCache: two deep neighbouring layers keep one direction per token, and a length each.

Source: Liu, Liu, Pan, He, Haffari, Zhuang, 2024, https://arxiv.org/abs/2405.14366, sections 4.1 and 4.2.
Differs: no code of the authors is known. The tokens that stay apart are those of the widest angle between keys, averaged over
    heads, a fixed share of them in place of a threshold, the same for values; almost parallel vectors are interpolated
    linearly; tokens after the prompt are not merged; layers of a pair keep the same tokens.
Cost: one interpolation per pair and prompt; per step and layer a product with the common directions, as
    they are held, and their lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.policy import Store, StoreBytes
from steno.cache.segment import HeadKV, Segment
from steno.methods.checks import require_real
from steno.types import KeptTokens, Need, Widths


@final
@dataclass(frozen=True, kw_only=True)
class MiniCache:
    """Pairs of layers with common directions.

    Parameters
    ----------
    start : float, default 0.5
        Share of the layers, from the first on, that stay as they are.
    deeper : float, default 0.6
        Where on the arc between the two directions the common one lies; 1 is the deeper layer's.
    retained : float, default 0.05
        Share of the tokens that both layers keep as they are, those whose keys are the most different; with pages some
        more, so that the merged ones fill theirs.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    """

    id: ClassVar[str] = "minicache"
    kind: ClassVar[str] = "share"
    title: ClassVar[str] = "MiniCache"
    paper: ClassVar[str] = "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2405.14366"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "A fixed share of the tokens with the widest angle stays unmerged, instead of those beyond a threshold; tokens "
        "after the prompt are not merged; no code of the authors is known."
    )

    start: float = 0.5
    deeper: float = 0.6
    retained: float = 0.05

    def __post_init__(self) -> None:
        require_real("start", self.start, 0, 1)
        require_real("deeper", self.deeper, 0, 1)
        require_real("retained", self.retained, 0, 1)

    def group(self, layer_idx: int, num_layers: int) -> range:
        """Pairs from the layer `start * L` on; an odd one at the end stays alone."""
        first = int(self.start * num_layers)
        if layer_idx < first:
            return range(layer_idx, layer_idx + 1)
        pair = first + (layer_idx - first) // 2 * 2
        return range(pair, pair + 2) if pair + 2 <= num_layers else range(layer_idx, layer_idx + 1)

    def stored(self, widths: Widths, num_sharing: int) -> Widths:
        """Directions of the same widths."""
        return widths

    def fixed_bytes(self, widths: Widths, num_layers: int, number_bytes: int) -> int:
        """One token more than the share that stays apart."""
        return widths.heads * (widths.keys + widths.values) * number_bytes + 8

    def shared_bytes(self, num_tokens: int, widths: Widths, num_sharing: int, store: StoreBytes) -> int:
        """Half of the common directions, two lengths of each head, and the tokens that stay apart with their places."""
        merged = self._num_merged(num_tokens, store.chunk_tokens)
        numbers = 2 * merged + (num_tokens - merged) * (widths.keys + widths.values)
        common = -(-store.stored_bytes(merged, widths) // num_sharing)
        return common + widths.heads * numbers * store.number_bytes + 4 * (num_tokens - merged)

    def _num_merged(self, num_tokens: int, chunk_tokens: int) -> int:
        return (num_tokens - math.ceil(self.retained * num_tokens)) // chunk_tokens * chunk_tokens

    def share(self, layers: Sequence[KeptTokens], store: Store) -> list[Segment]:
        """Segments with the directions of the pair in common."""
        keys, values = (
            [torch.stack(x) for x in side] for side in zip(*((t.keys, t.values) for t in layers), strict=True)
        )
        angles = torch.arccos(_cosine(*keys).clamp(-1, 1)).mean(0)  # [n]
        num_tokens = len(angles)
        num_merged = self._num_merged(num_tokens, store.chunk_tokens)
        apart = angles.argsort(descending=True, stable=True)[: num_tokens - num_merged].sort().values
        merged = torch.ones(num_tokens, dtype=torch.bool, device=apart.device)
        merged[apart] = False
        index = merged.nonzero()[:, 0]
        inner = None
        if len(index):
            pairs = [[x[:, index] for x in side] for side in (keys, values)]
            common = [_between(first, second, self.deeper) for first, second in pairs]
            where = [layers[0].positions[0][index]] * len(common[0])
            dtype = keys[0].dtype
            inner = store.store(
                replace(layers[0], keys=list(common[0].to(dtype)), values=list(common[1].to(dtype)), positions=where)
            )
        apart32 = apart.to(torch.int32)
        return [
            PairedSegment(
                inner=inner,
                key_lengths=k[:, index].float().norm(dim=-1).to(k.dtype),
                value_lengths=v[:, index].float().norm(dim=-1).to(v.dtype),
                apart=apart32,
                apart_keys=k[:, apart].contiguous(),
                apart_values=v[:, apart].contiguous(),
            )
            for k, v in zip(keys, values, strict=True)
        ]


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return torch.cosine_similarity(first.float(), second.float(), dim=-1, eps=1e-12)


def _between(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Unit vectors on the arc from `first` to `second`, `[..., D]` each, fp32; zero where both are."""
    a, b = (torch.nn.functional.normalize(x.float(), dim=-1, eps=1e-12) for x in (first, second))
    angle = torch.arccos((a * b).sum(-1, keepdim=True).clamp(-1, 1))
    sine = angle.sin()
    is_flat = sine < 1e-3  # parallel, or opposite: there is no arc, or no single one
    safe = torch.where(is_flat, 1.0, sine)
    left = torch.where(is_flat, 1 - weight, ((1 - weight) * angle).sin() / safe)
    right = torch.where(is_flat, weight, (weight * angle).sin() / safe)
    return torch.nn.functional.normalize(left * a + right * b, dim=-1, eps=1e-12)


@final
@dataclass(frozen=True, kw_only=True)
class PairedSegment(Segment):
    """One layer of a pair. inner: the directions of the merged tokens, in both layers the same segment; None without any.

    key_lengths, value_lengths: `[Hkv, m]` of the merged tokens. apart: `[p]` int32, ascending, which of the m + p tokens are
    not merged; apart_keys, apart_values: `[Hkv, p, D]` of these.
    """

    inner: Segment | None
    key_lengths: Tensor
    value_lengths: Tensor
    apart: Tensor
    apart_keys: Tensor
    apart_values: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.key_lengths.shape[1] + len(self.apart),) * len(self.key_lengths)

    def decode(self, dtype: torch.dtype) -> list[HeadKV]:
        heads = []
        directions = [] if self.inner is None else self.inner.decode(dtype)
        merged = self._merged
        for h in range(len(self.lengths)):
            both = []
            for i, (lengths, apart) in enumerate(
                ((self.key_lengths, self.apart_keys), (self.value_lengths, self.apart_values))
            ):
                x = apart.new_empty(self.lengths[0], apart.shape[2], dtype=dtype)
                x[~merged] = apart[h].to(dtype)
                if directions:
                    x[merged] = directions[h][i] * lengths[h, :, None].to(dtype)
                both.append(x)
            heads.append((both[0], both[1]))
        return heads

    @property
    def _merged(self) -> Tensor:
        """Which of the tokens are merged, `[m + p]` bool."""
        merged = torch.ones(self.lengths[0], dtype=torch.bool, device=self.apart.device)
        merged[self.apart.long()] = False
        return merged

    def products(self, q: Tensor) -> list[Tensor]:
        out = q.new_empty(*q.shape[:2], self.lengths[0])
        out[..., self.apart.long()] = q @ self.apart_keys.to(q.dtype).mT
        if self.inner is not None:
            out[..., self._merged] = torch.stack(self.inner.products(q)) * self.key_lengths[:, None].to(q.dtype)
        return list(out)

    def mix(self, weights: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(weights))  # [Hkv, M, m + p]
        out = stacked[..., self.apart.long()] @ self.apart_values.to(stacked.dtype)
        if self.inner is not None:
            out = out + self.inner.mix(list(stacked[..., self._merged] * self.value_lengths[:, None].to(out.dtype)))
        return out
