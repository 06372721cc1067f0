"""Retaining heads of Locret: they learn which tokens of a document the answers to questions about it look at."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, silu, smooth_l1_loss

from steno.learn.gather import look
from steno.learn.options import Options
from steno.learn.passages import passages
from steno.learn.training import train
from steno.methods.score.locret import retaining_input
from steno.session import LanguageModel
from steno.types import LayerKV, Need, Observation

HIDDEN = 32
SMOOTHING = 2.5e-3
LEARNING_RATE = 2e-3


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """`w1` `[L, 32, (H + 2 Hkv) D]` and `w2` `[L, Hkv, 32]` fp16."""
    needs = (Need.QUERIES, Need.PRE_ROPE_QUERIES, Need.PRE_ROPE_KEYS)

    @lru_cache(maxsize=1)
    def layers_of(step: int) -> tuple[Tensor, Tensor]:
        [passage] = passages(lm, text, seed=options.seed, first=step, last=step + 1)
        seen, end = look(lm, passage.tokens, *needs), passage.num_document_tokens
        return torch.stack([_input(*s, end) for s in seen]), torch.stack([labels(*s, end) for s in seen])

    x, wanted = layers_of(0)
    generator = torch.Generator().manual_seed(options.seed)
    w1 = torch.randn(x.shape[0], HIDDEN, x.shape[2], generator=generator) / (x.shape[2] ** 0.5 * x.std())
    w2 = torch.randn(x.shape[0], wanted.shape[1], HIDDEN, generator=generator) / HIDDEN**0.5
    heads = {"w1": w1.to(x.device), "w2": w2.to(x.device)}

    def loss_of(step: int) -> Tensor:
        x, wanted = layers_of(step)
        scores = heads["w2"] @ silu(x @ heads["w1"].mT).mT  # [L, Hkv, S]
        smooth = mse_loss(scores[..., 1:], scores[..., :-1]) * len(x)
        return smooth_l1_loss(scores, wanted) + SMOOTHING * smooth

    return train(heads, loss_of, options, learning_rate=LEARNING_RATE)


def _input(kv: LayerKV, obs: Observation, end: int) -> Tensor:
    assert obs.pre_rope_queries is not None, "it was asked for"
    assert obs.pre_rope_keys is not None, "it was asked for"
    return retaining_input(obs.pre_rope_queries[:, :end], obs.pre_rope_keys[:, :end], kv.values[:, :end])


def labels(kv: LayerKV, obs: Observation, end: int) -> Tensor:
    """Largest logit `[Hkv, end]` fp32 of each of the first `end` tokens over later queries and the group, normalised per head."""
    assert obs.queries is not None, "it was asked for"
    later = obs.queries[:, end:].float()  # [H, T, D]
    grouped = later.reshape(kv.num_kv_heads, -1, kv.head_dim)  # [Hkv, G * T, D]
    logits = (grouped @ kv.keys[:, :end].float().mT * obs.scaling).amax(1)  # [Hkv, end]
    spread, mean = torch.std_mean(logits, dim=1, keepdim=True, correction=0)
    return (logits - mean) / spread.clamp(min=1e-6)
