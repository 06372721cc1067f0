"""The heads of RazorAttention: which look, in a repetition of random tokens, at the same token or the one after it."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from steno.errors import UnsupportedAttention
from steno.kernels.attention.prefill import attention_and_lse
from steno.learn.gather import look
from steno.learn.options import Options
from steno.session import LanguageModel
from steno.types import LayerKV, Need, Observation

REPEATS = 4
BLOCK_TOKENS = 500
"""Random tokens that are repeated; the paper's 2500 do not fit every model."""


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """`induction` and `echo`, `[L, Hkv]` fp32; the text is not looked at."""
    positions = lm.loaded.max_positions or REPEATS * BLOCK_TOKENS + 1
    size = min(BLOCK_TOKENS, (positions - 1) // REPEATS)
    special = set(lm.tokenizer.all_special_ids)
    ordinary = [i for i in range(lm.model.get_input_embeddings().num_embeddings) if i not in special]
    block = random.Random(options.seed).choices(ordinary, k=size)
    first = lm.tokenizer.bos_token_id
    tokens = [first if first is not None else ordinary[0], *block * REPEATS]
    options.report("reading", 0, 1)
    seen = look(lm, tokens, Need.QUERIES)
    options.report("reading", 1, 1)
    scores = [(repeated_attention(*s, size, 1), repeated_attention(*s, size, 0)) for s in seen]
    return {"induction": torch.stack([a for a, _ in scores]), "echo": torch.stack([b for _, b in scores])}


def repeated_attention(kv: LayerKV, obs: Observation, size: int, after: int) -> Tensor:
    """Attention `[Hkv]` of a query to what stands `after` its own token in earlier repetitions.

    The mean over queries, the largest of the group. The mean over all pairs of tokens, as in Golden-Stick, would be the same
    but for a constant factor.
    """
    assert obs.queries is not None, "it was asked for"
    if obs.softcap is not None:
        raise UnsupportedAttention("the search for retrieval heads does not know logits with a soft cap.")
    q, k = obs.queries[None].float(), kv.keys[None].float()  # [1, H, S, D], [1, Hkv, S, D]
    _, lse = attention_and_lse(q, k, kv.values[None].float(), scale=obs.scaling, causal=True)
    group = q.shape[1] // k.shape[1]
    keys = k[0].repeat_interleave(group, dim=0)  # [H, S, D]
    total = torch.zeros(q.shape[1], device=q.device)
    for distance in range(size - after, kv.num_tokens, size):
        logits = (q[0, :, distance:] * keys[:, : kv.num_tokens - distance]).sum(-1) * obs.scaling
        total += (logits - lse[0, :, distance:]).exp().sum(1)
    return (total / kv.num_tokens).reshape(k.shape[1], group).amax(1)
