"""Keyformer: like H2O, but attention is gathered from logits with Gumbel noise and a rising temperature.

Source: Adnan, Arunkumar, Jain, Nair, Soloveychik, Kamath, 2024, https://arxiv.org/abs/2403.09054; the authors' code.
Differs: for grouped queries the noised attention is summed over the query heads of a KV head; recent and key tokens are
    shares of one budget that the recipe names, not of the prompt; eviction is at every step and really frees, where
    the authors' default file masks. Noise is drawn from `seed`, anew for every layer while the prompt is read and for
    every step after it, the same in all sequences; `anneal_tokens` stands for the length of the answer, which is not
    known here, and the temperature stays where it is after them.
Cost: the queries of the whole prompt, and a second pass over its logits in blocks with one draw of noise a logit:
    2*H*S*S*D FLOPs, H*S*S/2 draws; per step one draw and one exponential per query head and held token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.checks import MAX_INT, require_bool, require_int, require_real
from steno.types import LayerKV, Need, Observation

QUERY_BLOCK = 128


@final
@dataclass(frozen=True, kw_only=True)
class Keyformer:
    """Accumulated noised attention and a recent window, at every step.

    Parameters
    ----------
    recent_share : float, default 0.3 of the budget
        Share of the budget for the newest tokens, rounded down; key tokens get the rest.
    tau_init, tau_end : float, default 1.0 and 2.0
        Temperature while the prompt is read, and after `anneal_tokens` tokens; in between it changes linearly.
    anneal_tokens : int, default 128 tokens
        How long the temperature changes.
    noise : bool, default True
        Whether Gumbel noise is added to the logits.
    seed : int, default 0
        Of the noise.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    """

    id: ClassVar[str] = "keyformer"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "Keyformer"
    paper: ClassVar[str] = (
        "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference"
    )
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2403.09054"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUERIES})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Noised attention is summed over the query heads of a KV head; recent and key tokens are shares of one budget, not "
        "of the prompt; the temperature rises over `anneal_tokens`, as the length of the answer is not known."
    )
    evicts_while_decoding: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True

    recent_share: float = 0.3
    tau_init: float = 1.0
    tau_end: float = 2.0
    anneal_tokens: int = 128
    noise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require_real("recent_share", self.recent_share, 0, 1)
        require_real("tau_init", self.tau_init, 1e-3, 1e3)
        require_real("tau_end", self.tau_end, 1e-3, 1e3)
        require_int("anneal_tokens", self.anneal_tokens, 1)
        require_bool("noise", self.noise)
        require_int("seed", self.seed, 0)

    @property
    def query_window(self) -> int:
        return MAX_INT  # all of them

    @property
    def query_statistics_skip(self) -> int:
        return 0

    @property
    def min_tokens(self) -> int:
        return 0

    def temperature(self, step: int) -> float:
        """tau at a step; the prompt is step 0."""
        return self.tau_init + (self.tau_end - self.tau_init) * min(step / self.anneal_tokens, 1.0)

    def prefill_state(self, kv: LayerKV, obs: Observation) -> Tensor:
        """The noised attention that each token got from the queries of the prompt, summed over the group: `[Hkv, S]`."""
        assert obs.queries is not None, "the host gathers QUERIES"
        num_queries, num_tokens = obs.queries.shape[1], kv.num_tokens
        queries = obs.queries.float().reshape(kv.num_kv_heads, -1, num_queries, kv.head_dim)  # [Hkv, G, W, D]
        generator = self._generator(kv.keys.device, 2 * obs.layer_idx)
        state = torch.zeros(kv.num_kv_heads, num_tokens, device=kv.keys.device)
        for first in range(0, num_queries, QUERY_BLOCK):
            block = queries[:, :, first : first + QUERY_BLOCK]  # [Hkv, G, b, D]
            past = num_tokens - num_queries + first
            end = past + block.shape[2]
            logits = block @ kv.keys[:, None, :end].float().mT * obs.scaling  # [Hkv, G, b, end]
            if obs.softcap is not None:
                logits = obs.softcap * torch.tanh(logits / obs.softcap)
            future = torch.ones(block.shape[2], end, dtype=torch.bool, device=logits.device).triu(past + 1)
            noised = self._noised(logits, generator) / self.tau_init
            state[:, :end] += noised.masked_fill_(future, -torch.inf).softmax(-1).sum((1, 2))
        return state

    def observe(self, state: Tensor, weights: Tensor, *, step: int) -> Tensor:
        """Add this step's noised weights; the logarithm of a weight is its logit, but for what the softmax cancels."""
        generator = self._generator(weights.device, 2 * step + 1)
        noised = self._noised(weights.float().log(), generator) / self.temperature(step)
        return state + noised.softmax(-1).reshape(state.shape[0], -1, state.shape[1]).sum(1)  # [Hkv, n]

    def priority(self, state: Tensor, positions: Tensor, budget_tokens: int) -> Tensor:
        """The newest tokens first, then by gathered attention."""
        recent = min(int(self.recent_share * budget_tokens), positions.shape[1])
        if recent == 0:
            return state
        oldest_recent = positions.topk(recent).values[:, -1:]  # [Hkv, 1]
        return state.masked_fill(positions >= oldest_recent, torch.inf)  # [Hkv, n]

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """`priority` at the end of the prompt, `[Hkv, S]`."""
        positions = kv.positions.expand(kv.num_kv_heads, -1)  # [Hkv, S]
        return self.priority(self.prefill_state(kv, obs), positions, obs.budget_tokens)

    def _generator(self, device: torch.device, stream: int) -> torch.Generator:
        # the generator of a CPU takes 32 bits; an odd multiple keeps the streams of neighbouring seeds apart
        return torch.Generator(device=device).manual_seed((self.seed * 0x9E3779B1 + stream) % 2**32)

    def _noised(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        if not self.noise:
            return logits
        gumbel = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
        return logits + gumbel
