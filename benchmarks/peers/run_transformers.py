"""transformers itself: `DynamicCache`, and `QuantizedCache` of 4 bits with both of its backends; attention `sdpa`.

One prompt is read and its cache repeated for all rows, each in memory of its own: the same bytes and the same work as rows
that are read apart, in an eighth of the time.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from generate_steps import generate
from held import held_bytes
from peer_protocol import Answer, Request, serve
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

AXES = {"quanto": 0, "hqq": 1}
"""The axes that transformers' documentation recommends for each backend."""
REPEATED = "one prompt read, its cache repeated for every row, in memory of its own"


def measure(request: Request, *, dtype: str, backend: str | None = None) -> Answer:
    torch.set_num_threads(request.threads)
    model = AutoModelForCausalLM.from_pretrained(
        request.hf_folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    ids = torch.tensor(request.prompts[:1])
    started = time.perf_counter()
    cache: Any = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    if backend is None:
        cache.batch_repeat_interleave(request.rows)
    else:
        cache = quantized(cache, model.config, backend, request.rows)
    reading_s = time.perf_counter() - started
    timeline = generate(model, cache, ids.repeat(request.rows, 1), request)
    return Answer(
        engine=f"transformers {transformers.__version__}, torch {torch.__version__}",
        weights=dtype,
        compute=dtype,
        kv=f"{backend} int4, groups of 64, last 128 tokens {dtype}" if backend else dtype,
        timeline=replace(timeline, prefill_s=timeline.prefill_s + reading_s, tokens=timeline.tokens[:1]),
        kv_bytes=held_bytes(cache),
        kv_bytes_from="measured",
        differs=REPEATED if request.rows > 1 else "",
    )


def quantized(dense: DynamicCache, config: Any, backend: str, rows: int) -> QuantizedCache:
    """What a quantized cache makes of the same prompt: its layers quantize all that comes with their first update."""
    axis = AXES[backend]
    cache = QuantizedCache(
        backend, config, nbits=4, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=128
    )
    for layer, source in zip(cache.layers, dense.layers, strict=True):
        layer.update(source.keys.repeat_interleave(rows, 0), source.values.repeat_interleave(rows, 0))
        source.keys = source.values = None
    return cache


if __name__ == "__main__":
    serve({
        "DynamicCache, float32": partial(measure, dtype="float32"),
        "DynamicCache, bfloat16": partial(measure, dtype="bfloat16"),
        "QuantizedCache quanto 4 bits, float32": partial(measure, dtype="float32", backend="quanto"),
        "QuantizedCache hqq 4 bits, float32": partial(measure, dtype="float32", backend="hqq"),
    })  # fmt: skip
