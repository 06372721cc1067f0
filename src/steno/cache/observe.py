"""What a method must see of the prompt, gathered while it is read, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from steno.cache.policy import LayerPolicy
from steno.errors import CacheError
from steno.types import LayerKV, Need, Observation, Rope

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
        self.plain_queries: Tensor | None = None  # [H, S, D]
        self.hidden: Tensor | None = None  # [S, hidden]
        self.is_image: Tensor | None = None  # [S]

    def see(
        self,
        q: Tensor,
        hidden: Tensor | None = None,
        *,
        is_image: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """The queries of one chunk, `[H, T, D]` post-RoPE, and what went into its attention module, `[T, hidden]`.

        is_image: `[T]` bool. positions: `[T]`, the true ones; None: they follow on what was seen.
        """
        if positions is None:
            positions = torch.arange(self.num_seen, self.num_seen + q.shape[1], device=q.device)
        if Need.QUERIES in self.policy.needs:
            window = q if self.queries is None else torch.cat([self.queries, q], dim=1)
            self.queries = window[:, -self.policy.query_window :].clone()
        if Need.QUERY_STATISTICS in self.policy.needs:
            self._gather_statistics(q, positions)
        if Need.PRE_ROPE_QUERIES in self.policy.needs:
            plain = q.clone() if self.rope is None else self.rope.undo(q, positions)
            self.plain_queries = plain if self.plain_queries is None else torch.cat([self.plain_queries, plain], dim=1)
        if Need.HIDDEN_STATES in self.policy.needs:
            if hidden is None:
                raise CacheError(
                    "this recipe looks at hidden states, which generate() alone does not show: read the text with "
                    "steno.load(...).read(text, recipe=...), or generate within `with cache.watching(model):`."
                )
            self.hidden = hidden.clone() if self.hidden is None else torch.cat([self.hidden, hidden])
        if is_image is not None:
            self.is_image = is_image.clone() if self.is_image is None else torch.cat([self.is_image, is_image])
        self.num_seen += q.shape[1]

    def see_mass(self, mass: Tensor) -> None:
        """The attention `[H, S]` fp32 that all tokens read so far, those of the chunk included, got from the chunk."""
        if self.mass is not None:
            mass[:, : self.mass.shape[1]] += self.mass
        self.mass = mass

    def _gather_statistics(self, q: Tensor, positions: Tensor) -> None:
        skip = min(max(0, self.policy.query_statistics_skip - self.num_seen), q.shape[1])
        for start in range(skip, q.shape[1], STATISTICS_BLOCK):
            block = q[:, start : start + STATISTICS_BLOCK].float()
            where = positions[start : start + STATISTICS_BLOCK]
            plain = block if self.rope is None else self.rope.undo(block, where)
            # products of a block in fp32 are off by its 1e-6; what adds up the blocks must not add to that
            total, products = plain.sum(1).double(), (plain.mT @ plain).double()  # [H, D], [H, D, D]
            self.query_sum = total if self.query_sum is None else self.query_sum + total
            self.query_products = products if self.query_products is None else self.query_products + products
            self.num_statistics += block.shape[1]

    def observation(
        self,
        kv: LayerKV,
        *,
        layer_idx: int,
        num_layers: int,
        budget_tokens: int,
        replay_mass: Tensor | None,
        prompt_tokens: int | None = None,
    ) -> Observation:
        """What was gathered, in the form that methods get; kv: the tokens that were read."""
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
            pre_rope_queries=self.plain_queries,
            pre_rope_keys=self._plain_keys(kv),
            hidden_states=self.hidden,
            image_mask=self.is_image,
            replay_mass=replay_mass,
            positions=kv.positions if self.policy.router is not None else None,
            prompt_tokens=prompt_tokens,
        )

    def _plain_keys(self, kv: LayerKV) -> Tensor | None:
        if Need.PRE_ROPE_KEYS not in self.policy.needs:
            return None
        return kv.keys if self.rope is None else self.rope.undo(kv.keys, kv.positions)
