"""What each layer does under HyLRA: read everything, choose tokens, or read what an earlier layer chose.

From one prompt, whose last queries stand for decode steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steno.kernels.attention import attention_weights
from steno.learn.gather import look
from steno.learn.options import Options
from steno.learn.pieces import pieces
from steno.methods.access.hylra import SOURCE, mass_ratio, plan_layers, robust_mean
from steno.session import LanguageModel
from steno.types import PAGE_TOKENS, LayerKV, Need, Observation

PROMPT_TOKENS = 4096
STEPS = 256
"""Queries that stand for decode steps."""
KEEP, SINKS, RECENT = 1 / 4, 1 / 64, 1 / 16
"""Shares of the prompt that a layer chooses, and of the first and newest tokens among them."""


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """`source_layer` `[L]`, as `plan_layers` answers."""
    [tokens] = pieces(lm, text, count=1, size=PROMPT_TOKENS, seed=options.seed)
    options.report("reading", 0, 2)
    seen = look(lm, tokens, Need.QUERIES, query_window=STEPS)
    options.report("reading", 1, 2)
    ratios, chosen = zip(*(_profile(kv, obs) for kv, obs in seen), strict=True)
    options.report("reading", 2, 2)
    return {SOURCE: torch.tensor(plan_layers(torch.stack(ratios), overlap(torch.stack(chosen))))}


def _profile(kv: LayerKV, obs: Observation) -> tuple[Tensor, Tensor]:
    """How widely the attention of a layer spreads, and which pages each step chooses: `[]` and `[Hkv, STEPS, pages]` bool."""
    assert obs.queries is not None, "it was asked for"
    weights = attention_weights(obs.queries, kv.keys, scale=obs.scaling, softcap=obs.softcap)  # [H, steps, S]
    mass = torch.nn.functional.pad(weights, (0, -weights.shape[2] % PAGE_TOKENS)).unflatten(2, (-1, PAGE_TOKENS)).sum(3)
    mass = mass.unflatten(0, (kv.num_kv_heads, -1)).mean(1)  # [Hkv, steps, pages]
    return robust_mean(mass_ratio(mass)).mean(), chosen_pages(mass)


def chosen_pages(mass: Tensor) -> Tensor:
    """The pages with the most of `mass` `[..., pages]`, first and newest among them: bool of that shape."""
    pages = mass.shape[-1]
    count, first, newest = (max(1, round(pages * share)) for share in (KEEP, SINKS, RECENT))
    forced = mass.clone()
    forced[..., :first], forced[..., pages - newest :] = torch.inf, torch.inf
    order = forced.argsort(dim=-1, descending=True, stable=True)[..., : max(count, min(pages, first + newest))]
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, True)


def overlap(chosen: Tensor) -> Tensor:
    """`[L, L]`: the share of what layer j chooses that layer i chooses too, the mean over steps, of the head where it is least.

    chosen: `[L, Hkv, steps, pages]`, as many pages in each step.
    """
    x = chosen.float()
    common = torch.einsum("ihsp,jhsp->ijhs", x, x) / x[0, 0, 0].sum()
    return common.mean(3).amin(2)
