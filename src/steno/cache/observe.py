"""What a method must see of the prompt, gathered while it is read, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from steno.cache.policy import LayerPolicy
from steno.types import Need, Observation, Rope

STATISTICS_BLOCK = 512
"""Queries whose statistics are computed at a time, so that the temporaries stay in the processor's cache."""


class PromptObserver:
    """Gathers the needs of one policy for one sequence of one layer. Mutable; dropped once the prompt is compressed."""

    def __init__(self, policy: LayerPolicy, rope: Rope | None, *, scale: float, softcap: float | None) -> None:
        self.policy, self.rope, self.scale, self.softcap = policy, rope, scale, softcap
        self.num_seen = 0
        self.queries: Tensor | None = None  # [H, <= window, D]
        self.mass: Tensor | None = None  # [H, S]
        self.query_sum: Tensor | None = None  # [H, D] fp64
        self.query_products: Tensor | None = None  # [H, D, D] fp64
        self.num_statistics = 0

    def see(self, q: Tensor) -> None:
        """The queries of one chunk, `[H, T, D]` post-RoPE."""
        if Need.QUERIES in self.policy.needs:
            window = q if self.queries is None else torch.cat([self.queries, q], dim=1)
            self.queries = window[:, -self.policy.query_window :].clone()
        if Need.QUERY_STATISTICS in self.policy.needs:
            self._gather_statistics(q)
        self.num_seen += q.shape[1]

    def see_mass(self, mass: Tensor) -> None:
        """The attention `[H, S]` fp32 that all tokens read so far, those of the chunk included, got from the chunk."""
        if self.mass is not None:
            mass[:, : self.mass.shape[1]] += self.mass
        self.mass = mass

    def _gather_statistics(self, q: Tensor) -> None:
        skip = min(max(0, self.policy.query_statistics_skip - self.num_seen), q.shape[1])
        for start in range(skip, q.shape[1], STATISTICS_BLOCK):
            block = q[:, start : start + STATISTICS_BLOCK].float()
            first = self.num_seen + start
            positions = torch.arange(first, first + block.shape[1], device=q.device)
            plain = _unrotate(block, positions, self.rope)
            # products of a block in fp32 are off by its 1e-6; what adds up the blocks must not add to that
            total, products = plain.sum(1).double(), (plain.mT @ plain).double()  # [H, D], [H, D, D]
            self.query_sum = total if self.query_sum is None else self.query_sum + total
            self.query_products = products if self.query_products is None else self.query_products + products
            self.num_statistics += block.shape[1]

    def observation(
        self, *, layer_idx: int, num_layers: int, budget_tokens: int, replay_mass: Tensor | None
    ) -> Observation:
        """What was gathered, in the form that methods get."""
        mean = covariance = None
        if self.query_sum is not None and self.query_products is not None:
            exact = self.query_sum / self.num_statistics
            mean = exact.float()
            covariance = (self.query_products / self.num_statistics - exact[:, :, None] * exact[:, None, :]).float()
        return Observation(
            layer_idx=layer_idx,
            num_layers=num_layers,
            scaling=self.scale,
            softcap=self.softcap,
            budget_tokens=budget_tokens,
            rope=self.rope,
            queries=self.queries,
            query_mean=mean,
            query_cov=covariance,
            attention_mass=self.mass,
            replay_mass=replay_mass,
        )


def _unrotate(q: Tensor, positions: Tensor, rope: Rope | None) -> Tensor:
    """Pre-RoPE queries from post-RoPE ones, q `[H, T, D]` fp32; only the rotated dimensions change."""
    if rope is None:
        return q
    cos, sin = rope.cos_sin(positions)  # [T, R]
    rotated, rest = q[..., : cos.shape[-1]], q[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat([second, -first], dim=-1)  # the inverse of rotate_half
    plain = (rotated * cos + turned * sin) / rope.attention_scaling**2
    return torch.cat([plain, rest], dim=-1)
