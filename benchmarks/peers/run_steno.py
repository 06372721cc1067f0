"""Steno itself, measured as its peers are: `generate()` with a `KVCache`, the prompts read by it."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch
from generate_steps import generate
from peer_protocol import Answer, Request, Skipped, serve

import steno
from steno.methods import KVzip
from steno.replay import replay_context
from steno.types import Need


def measure(request: Request, *, recipe: str, weights: str | None = None) -> Answer:
    torch.set_num_threads(request.threads)
    lm = steno.load(request.hf_folder, weights=weights)
    compute = str(lm.model.dtype).removeprefix("torch.")
    cache = steno.KVCache(lm.model.config, recipe)
    ids = torch.tensor(request.prompts)
    reading_s = replay(lm, cache, ids) if Need.REPLAY in cache.recipe.needs else 0.0
    timeline = generate(lm.model, cache, ids, request)
    return Answer(
        engine=f"steno {steno.__version__}",
        weights=weights or compute,
        compute=compute,
        kv=recipe,
        timeline=replace(timeline, prefill_s=timeline.prefill_s + reading_s),
        kv_bytes=cache.kv_bytes,
        kv_bytes_from="measured",
        differs="keeps half of the tokens" if "50%" in recipe else "",
    )


def replay(lm: steno.LanguageModel, cache: steno.KVCache, ids: torch.Tensor) -> float:
    """Reads all but the last token of one prompt and scores it as kvzip does; seconds taken."""
    if len(ids) > 1:
        raise Skipped("kvzip scores one sequence at a time")
    started = time.perf_counter()
    method = cache.recipe.score
    assert isinstance(method, KVzip)
    tokens = ids[0, :-1].tolist()
    with torch.inference_mode():
        lm.model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    masses = replay_context(
        lm.model,
        cache,
        tokens,
        num_prefix_tokens=0,
        method=method,
        tokenizer=lm.tokenizer,
        after=lm.template.after,
        max_positions=lm.loaded.max_positions,
    )
    cache.compress(masses)
    return time.perf_counter() - started


RECIPES = ("full", "int4 @ 100%", "snapkv | adakv | kivi(bits=4) @ 50%", "kvzip | adakv | kivi(bits=4) @ 50%")

if __name__ == "__main__":
    small = {
        f"{recipe}, {weights} weights": partial(measure, recipe=recipe, weights=weights)
        for weights in ("bf16", "int8", "int4")
        for recipe in RECIPES[1:]
    }
    serve({recipe: partial(measure, recipe=recipe) for recipe in RECIPES} | small)
