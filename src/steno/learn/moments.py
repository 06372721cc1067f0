"""Second moments and means of keys before RoPE and of values: for `palu`, `cskv` and `rotatekv(statistics=…)`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steno.cache.latent import second_moment
from steno.errors import PromptError
from steno.learn.gather import look
from steno.learn.options import Options
from steno.session import LanguageModel
from steno.types import Need

MIN_TOKENS = 64


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """`key_moment`, `value_moment` `[L, C, C]` and `key_mean` `[L, C]`, C = Hkv D, heads side by side; fp16 if all fit."""
    tokens = lm.tokenize(text)[: lm.loaded.max_positions]
    if len(tokens) < MIN_TOKENS:
        raise PromptError(f"calibration needs at least {MIN_TOKENS} tokens of text; got {len(tokens)}.")
    options.report("reading", 0, 1)
    keys, values, means = [], [], []
    for kv, seen in look(lm, tokens, Need.PRE_ROPE_KEYS):
        assert seen.pre_rope_keys is not None
        keys.append(second_moment(list(seen.pre_rope_keys)))
        values.append(second_moment(list(kv.values)))
        means.append(seen.pre_rope_keys.float().mean(1).flatten())
    options.report("reading", 1, 1)
    found = {"key_moment": torch.stack(keys), "value_moment": torch.stack(values), "key_mean": torch.stack(means)}
    fits = all(x.abs().max() < torch.finfo(torch.float16).max for x in found.values())
    return {name: x.half() if fits else x for name, x in found.items()}
