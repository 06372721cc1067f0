"""ThinK: of every key head drop the channels that queries and keys use least; queries drop the same ones.

Source: Xu, Jie, Dong, Wang, Lu, Zhou, Saha, Xiong, Sahoo, 2024, https://arxiv.org/abs/2407.21018, section 3; the authors'
    code.
Differs: channels are chosen per KV head by the mean square of its group's queries (the authors' code repeats keys for every
    query head first); tokens after the prompt are pruned with the same channels once 32 newer ones have come.
Cost: two sums of squares over what is kept of the prompt; per step a gather of the queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.transformed import ALL_HEADS, Basis, HeadBasis
from steno.methods.checks import require_int, require_real
from steno.types import PAGE_TOKENS, KeptTokens, Need, Widths


@final
@dataclass(frozen=True, kw_only=True)
class ThinK:
    """Keys of fewer channels.

    It belongs in front of a rotation, `think | hadamard`: behind one, every channel is used.

    Parameters
    ----------
    ratio : float, default 0.4
        Share of key channels that are dropped; at least one stays.
    window : int, default 32 tokens
        Last queries of the prompt that say which channels matter.
    recent : int, default 32 tokens
        Newest tokens that keep all their channels.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    """

    id: ClassVar[str] = "think"
    kind: ClassVar[str] = "transform"
    title: ClassVar[str] = "ThinK"
    paper: ClassVar[str] = "ThinK: Thinner Key Cache by Query-Driven Pruning"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2407.21018"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUERIES})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Channels are chosen per KV head over the queries of its group, and tokens after the prompt are pruned with the "
        "same channels once enough newer ones have come."
    )
    heads_together: ClassVar[bool] = False
    keeps_spans: ClassVar[bool] = False

    ratio: float = 0.4
    window: int = 32
    recent: int = 32

    def __post_init__(self) -> None:
        require_real("ratio", self.ratio, 0, 1)
        require_int("window", self.window, 1)
        require_int("recent", self.recent, 0)

    @property
    def query_window(self) -> int:
        return self.window

    @property
    def first_tokens(self) -> int:
        return 0

    @property
    def recent_tokens(self) -> int:
        return self.recent

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS

    def stored(self, widths: Widths) -> Widths:
        """Fewer channels of keys."""
        return replace(widths, keys=self._num_channels(widths.keys))

    def basis_bytes(self, widths: Widths, num_layers: int, number_bytes: int) -> int:
        """The channels that stay, int64."""
        return widths.heads * self._num_channels(widths.keys) * 8

    def _num_channels(self, head_dim: int) -> int:
        return max(1, head_dim - int(head_dim * self.ratio))

    def fit(self, tokens: KeptTokens) -> Basis:
        """The channels with the largest mean square of queries times mean square of keys; ties go to the earlier one."""
        assert tokens.observation is not None, "a basis is fit to a prompt"
        queries = tokens.observation.queries
        assert queries is not None, "the host gathers QUERIES"
        used = queries[:, -self.window :].float().square().mean(1)  # [H, D]
        used = used.unflatten(0, (len(tokens.keys), -1)).mean(1)  # [Hkv, D]
        sizes = torch.stack([k.float().square().sum(0) / max(1, len(k)) for k in tokens.keys])  # [Hkv, D]
        order = (used * sizes).argsort(dim=1, descending=True, stable=True)
        return ChannelBasis(
            channels=order[:, : self._num_channels(used.shape[1])].sort(1).values, head_dim=used.shape[1]
        )


@final
@dataclass(frozen=True, kw_only=True)
class ChannelBasis(HeadBasis):
    """Some channels of keys and queries, all of values. channels: `[Hkv, Dk]` int64, ascending."""

    channels: Tensor
    head_dim: int

    def keys(self, k: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        return k.gather(-1, self._index(k, heads))

    def queries(self, q: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        return q.gather(-1, self._index(q, heads))

    def plain_keys(self, k: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        plain = k.new_zeros(*k.shape[:-1], self.head_dim)
        return plain.scatter_(-1, self._index(k, heads), k)

    def values(self, v: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        return v

    def outputs(self, o: Tensor, heads: slice = ALL_HEADS) -> Tensor:
        return o

    def _index(self, x: Tensor, heads: slice) -> Tensor:
        """`[..., h, n, Dk]` for x `[..., h, n, d]`."""
        channels = self.channels[heads]
        return channels[:, None].expand(*x.shape[:-1], channels.shape[1])
