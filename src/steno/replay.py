"""The replay of KVzip: the model repeats its context, and every layer notes which tokens it looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steno.cache.prompt import ReplayedLayer
from steno.errors import PromptError
from steno.kernels.attention.mass import max_attention
from steno.kernels.attention.prefill import attention_and_lse
from steno.methods.score.kvzip import FIRST_PROMPT, NEXT_PROMPT, KVzip, reconstruction_mass
from steno.models.kvcache import KVCache

MIN_CHUNK_TOKENS = 256


def replay_context(
    model: Any,
    cache: KVCache,
    tokens: Sequence[int],
    *,
    num_prefix_tokens: int,
    method: KVzip,
    tokenizer: Any,
    after: str,
    max_positions: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Scores `[Hkv, S]` fp32 per layer under the recipe, the first `num_prefix_tokens` (system prompt) +inf.

    tokens: the S tokens that the cache holds, dense. after: what ends the user's turn and begins the assistant's.
    progress: called with (layers done, layers in all), over all passes. The cache is left as it was.
    """
    context = list(tokens[num_prefix_tokens:])
    requests = {prompt: tokenizer.encode(prompt, add_special_tokens=False) for prompt in (FIRST_PROMPT, NEXT_PROMPT)}
    answer = tokenizer.encode(after, add_special_tokens=False)
    overhead = max(map(len, requests.values())) + method.postfix_tokens + len(answer)
    size = _chunk_size(len(tokens), method, max_positions, overhead)
    chunks = [(a, min(a + size, len(context))) for a in range(0, len(context), size)]
    masses: list[Tensor | None] = [None] * len(cache.own_layers)

    for done, (a, b) in enumerate(chunks):
        quoted = context[max(0, a - method.postfix_tokens) : a]
        request = requests[FIRST_PROMPT if a == 0 else NEXT_PROMPT] + quoted + answer
        first, last = num_prefix_tokens + a, num_prefix_tokens + b

        def observe(view: ReplayedLayer, first: int = first, last: int = last) -> None:
            whole = masses[view.layer_idx]
            if whole is None:
                whole = view.queries.new_zeros(view.kv.num_kv_heads, view.kv.num_tokens, dtype=torch.float32)
                whole[:, :num_prefix_tokens] = torch.inf
                masses[view.layer_idx] = whole
            whole[:, first:last] = _chunk_mass(view, num_prefix_tokens, first, last)

        inputs = torch.tensor([request + context[a:b]], dtype=torch.long, device=model.device)
        if progress is not None:
            cache.reading.on_layer = over_all_passes(progress, done, len(chunks))
        with cache.replaying(observe), torch.inference_mode():
            model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [mass for mass in masses if mass is not None]


def over_all_passes(progress: Callable[[int, int], None], done: int, passes: int) -> Callable[[int, int], None]:
    """Progress of one pass, after `done` others, as progress of all."""
    return lambda layer, layers: progress(done * layers + layer, passes * layers)


def _chunk_mass(view: ReplayedLayer, num_prefix_tokens: int, first: int, last: int) -> Tensor:
    """Largest attention `[Hkv, last - first]` that the tokens of a chunk receive in one layer of its replay.

    The softmax runs over the prefix, the chunk and the replay itself, not over other chunks.
    """
    chunk, prefix = view.kv.keys[:, first:last], view.kv.keys[:, :num_prefix_tokens]
    if view.past_lse is None or view.own_lse is None:
        return reconstruction_mass(view.queries, chunk, prefix, view.own_keys, scaling=view.scale, softcap=view.softcap)
    past_lse = view.past_lse
    if last - first + num_prefix_tokens < view.kv.num_tokens:
        part = torch.cat([prefix, chunk], dim=1)[None]
        past_lse = attention_and_lse(view.queries[None], part, part, scale=view.scale, causal=False)[1][0]
    return max_attention(view.queries, chunk, torch.logaddexp(past_lse, view.own_lse), scale=view.scale)


def _chunk_size(num_tokens: int, method: KVzip, max_positions: int | None, overhead: int) -> int:
    """Tokens per pass beside the `overhead` of its request: the method's, or less where the model's positions end."""
    if max_positions is None:
        return method.chunk_tokens
    room = max_positions - num_tokens - overhead
    least = min(MIN_CHUNK_TOKENS, method.chunk_tokens, num_tokens)
    if room < least:
        raise PromptError(
            f"kvzip replays the context after itself and needs at least {least + overhead} free positions; the prompt of "
            f"{num_tokens} tokens leaves {max_positions - num_tokens} of {max_positions}: shorten it by {least - room} "
            "tokens or use another scorer."
        )
    return min(method.chunk_tokens, room)
