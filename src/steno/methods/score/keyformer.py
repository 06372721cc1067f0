"""Keyformer: like H2O, but attention is gathered from logits with Gumbel noise and a rising temperature.

Source: Adnan, Arunkumar, Jain, Nair, Soloveychik, Kamath, 2024, https://arxiv.org/abs/2403.09054; the authors' code.
Differs: for grouped queries the noised attention is summed over the query heads of a KV head; recent and key tokens are
    shares of one budget that the recipe names, not of the prompt; of a long prompt `sampled` queries, evenly spread, stand
    for all, each for its neighbours (the paper takes them all, at several times the price of the prompt);
    eviction is at every step and really frees, where the authors' default file masks. Noise is drawn from `seed`,
    anew for every layer while the prompt is read and for every step after it, the same in all sequences;
    `anneal_tokens` stands for the length of the answer, which is not known here, and the temperature stays where it
    is after them.
Cost: the queries of the whole prompt, and a second pass over the logits of W of them, with one draw of noise a logit:
    2*H*W*S*D FLOPs, H*W*S/2 draws; per step one draw and one exponential per query head and held token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.checks import MAX_INT, require_bool, require_int, require_real
from steno.types import LayerKV, Need, Observation

QUERY_BLOCK = 32
"""Sampled queries whose logits are computed at a time."""


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
    sampled : int, default 128
        Queries of the prompt whose attention is gathered, at most; a number beyond the length of the prompt takes all.

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
        "Noised attention is summed over the query heads of a KV head, of 128 queries that stand for the whole prompt; recent "
        "and key tokens are shares of one budget, not of the prompt; the temperature rises over `anneal_tokens`, as the "
        "length of the answer is not known."
    )
    evicts_while_decoding: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True

    recent_share: float = 0.3
    tau_init: float = 1.0
    tau_end: float = 2.0
    anneal_tokens: int = 128
    noise: bool = True
    seed: int = 0
    sampled: int = 128

    def __post_init__(self) -> None:
        require_real("recent_share", self.recent_share, 0, 1)
        require_real("tau_init", self.tau_init, 1e-3, 1e3)
        require_real("tau_end", self.tau_end, 1e-3, 1e3)
        require_int("anneal_tokens", self.anneal_tokens, 1)
        require_bool("noise", self.noise)
        require_int("seed", self.seed, 0)
        require_int("sampled", self.sampled, 1)

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
        rows = self._rows(num_queries).to(kv.keys.device)
        queries = obs.queries.reshape(kv.num_kv_heads, -1, num_queries, kv.head_dim)  # [Hkv, G, W, D]
        generator = self._generator(kv.keys.device, 2 * obs.layer_idx)
        keys = kv.keys.float().mT  # [Hkv, D, S]
        state = torch.zeros(kv.num_kv_heads, num_tokens, device=kv.keys.device)
        for block in rows.split(QUERY_BLOCK):
            last = block + (num_tokens - num_queries)  # the newest token that each query sees
            end = int(last[-1]) + 1
            x = queries[:, :, block].float().flatten(1, 2) @ keys[..., :end] * obs.scaling  # [Hkv, G * b, end]
            if obs.softcap is not None:
                x = obs.softcap * torch.tanh(x / obs.softcap)
            future = torch.arange(end, device=x.device) > last[:, None]  # [b, end]
            x.unflatten(1, (-1, len(block))).masked_fill_(future, -torch.inf)
            state[:, :end] += self._noised_weights(x, self.tau_init, generator).sum(1)
        return state.mul_(num_queries / len(rows))

    def _rows(self, num_queries: int) -> Tensor:
        """The queries that are looked at, ascending, the last one among them."""
        count = min(self.sampled, num_queries)
        return (torch.arange(1, count + 1) * num_queries).div(count, rounding_mode="floor") - 1

    def observe(self, state: Tensor, weights: Tensor, *, step: int) -> Tensor:
        """Add this step's noised weights; the logarithm of a weight is its logit, but for what the softmax cancels."""
        generator = self._generator(weights.device, 2 * step + 1)
        noised = self._noised_weights(weights.float().log(), self.temperature(step), generator)
        return state + noised.reshape(state.shape[0], -1, state.shape[1]).sum(1)  # [Hkv, n]

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

    def _noised_weights(self, logits: Tensor, tau: float, generator: torch.Generator) -> Tensor:
        """softmax((logits + Gumbel noise) / tau), overwriting the logits."""
        weights = (logits - logits.amax(-1, keepdim=True)).div_(tau).exp_()
        if self.noise:
            # the noise is -log of an exponential draw: of the weight, a divisor, and never 0
            draws = torch.rand(weights.shape, generator=generator, device=weights.device).log_().neg_()
            weights.div_(draws if tau == 1 else draws.pow_(1 / tau))
        return weights.div_(weights.sum(-1, keepdim=True))
