"""How much an error of each layer's keys and values changes what the model says next: for levels of quality of files.

The expected squared gradient of the log-probability of tokens that the model itself draws, with respect to the keys and
values of the text before them: the diagonal of the Fisher information, which is the curvature of the KL divergence.
Source: the idea that layers differ is CacheGen's (Liu et al., 2023, https://arxiv.org/abs/2310.07240), which sets them by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from steno.codec.transform import FIRST_TOKENS
from steno.errors import PromptError
from steno.learn.options import Options
from steno.models.host import NAME
from steno.session import LanguageModel

DRAWN_TOKENS = 256
DRAWS = 2
MAX_TOKENS = 4096
MIN_TOKENS = 1024


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """`keys`, `values` `[L]` fp32: root mean squared gradient times standard deviation, in a geometric mean of 1."""
    tokens = lm.tokenize(text)[: min(MAX_TOKENS, lm.loaded.max_positions or MAX_TOKENS)]
    if len(tokens) < MIN_TOKENS:
        raise PromptError(f"calibration needs at least {MIN_TOKENS} tokens of text; got {len(tokens)}.")
    old, new = tokens[:-DRAWN_TOKENS], tokens[-DRAWN_TOKENS:]
    generator = torch.Generator(device=lm.model.device).manual_seed(options.seed)
    lm.model.set_attn_implementation("sdpa")  # has gradients
    try:
        held = _read(lm, old)
        squares = torch.zeros(2, len(held))
        for draw in range(DRAWS):
            options.report("drawing", draw, DRAWS)
            squares += _squared_gradients(lm, held, new, generator)
        options.report("drawing", DRAWS, DRAWS)
    finally:
        lm.model.set_attn_implementation(NAME)
    deviations = torch.stack([torch.stack([_deviation(x) for x in pair]) for pair in held], 1)  # [2, L]
    keys, values = squares.sqrt() * deviations.cpu()
    return {"keys": _relative(keys), "values": _relative(values)}


def _read(lm: LanguageModel, tokens: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[1, Hkv, N, D]` of each layer."""
    cache = DynamicCache(config=lm.model.config)
    with torch.no_grad():
        lm.model(torch.tensor([tokens], device=lm.model.device), past_key_values=cache, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _squared_gradients(lm: LanguageModel, held: list[tuple[Tensor, Tensor]], new: list[int], generator: Any) -> Tensor:
    """Mean over values, of one draw of each token after `new`: `[2, L]`."""
    leaves = [tuple(x.detach().clone().requires_grad_() for x in pair) for pair in held]
    cache = DynamicCache(config=lm.model.config)
    for idx, (keys, values) in enumerate(leaves):
        cache.update(keys, values, idx)
    logits = lm.model(torch.tensor([new], device=lm.model.device), past_key_values=cache).logits[0].float()
    scores = logits.log_softmax(-1)
    drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
    scores.gather(1, drawn).sum().backward()
    return torch.tensor([[_mean_square(x) for x in pair] for pair in leaves]).T


def _mean_square(leaf: Tensor) -> float:
    """Of the gradient of keys or values `[1, Hkv, N, D]`."""
    if leaf.grad is None:  # a layer that nothing reads
        return 0.0
    return float((leaf.grad[:, :, FIRST_TOKENS:].float() ** 2).mean())


def _deviation(x: Tensor) -> Tensor:
    return x[0, :, FIRST_TOKENS:].float().var(1, correction=0).mean().sqrt()


def _relative(x: Tensor) -> Tensor:
    logs = x.clamp(min=1e-30).log()
    return (logs - logs.mean()).exp()
