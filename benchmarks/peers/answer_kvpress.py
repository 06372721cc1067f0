"""kvpress under `steno bench --peer`: a press on the prefill, then questions decoded from the compressed cache.

As kvpress's own pipeline does it: the press is active while the text is read, later tokens keep their true positions, and the
presses stand with their defaults. What kvpress only masks (AdaKV, KVzip) stays in memory, and its bytes say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import kvpress
import torch
from answer_protocol import Held, serve
from held import held_bytes
from transformers import DynamicCache


def read(model: Any, ids: torch.Tensor, share: float | None, *, make: Callable[[float], Any]) -> Held:
    assert share is not None
    cache, press, peak = DynamicCache(), make(1 - share), 0

    def note(*_: Any) -> None:
        """After the attention of a layer and before its press: that layer is still dense."""
        nonlocal peak
        peak = max(peak, held_bytes(cache))

    hooks = [layer.self_attn.register_forward_hook(note) for layer in model.model.layers]
    started = time.perf_counter()
    try:
        with press(model):
            model.model(input_ids=ids, past_key_values=cache)
            read_at = time.perf_counter()
    finally:
        for hook in hooks:
            hook.remove()
    return Held(
        cache=cache,
        num_tokens=ids.shape[1],
        prefill_s=read_at - started,
        compress_s=time.perf_counter() - read_at,
        kv_bytes_peak=max(peak, held_bytes(cache)),
    )


def alone(press: Any) -> Any:
    return partial(read, make=lambda ratio: press(compression_ratio=ratio))


def under_adakv(press: Any) -> Any:
    return partial(read, make=lambda ratio: kvpress.AdaKVPress(press(compression_ratio=ratio)))


METHODS = {
    "streaming_llm": alone(kvpress.StreamingLLMPress),
    "snapkv": alone(kvpress.SnapKVPress),
    "pyramidkv": alone(kvpress.PyramidKVPress),
    "tova": alone(kvpress.TOVAPress),
    "keydiff": alone(kvpress.KeyDiffPress),
    "knorm": alone(kvpress.KnormPress),
    "expected_attention": alone(kvpress.ExpectedAttentionPress),
    "kvzip": alone(kvpress.KVzipPress),
    "adakv_snapkv": under_adakv(kvpress.SnapKVPress),
    "adakv_expected_attention": under_adakv(kvpress.ExpectedAttentionPress),
}

if __name__ == "__main__":
    serve(METHODS, ("kvpress", "transformers", "torch"))
