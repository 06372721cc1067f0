"""transformers' own caches under `steno bench --peer`: `DynamicCache`, and `QuantizedCache` with both of its backends.

A quantized cache is as its documentation recommends: groups of 64, up to 128 of the newest tokens dense, axis 0 for quanto and
1 for HQQ. To read it one layer at a time is made dense, which its peak counts.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from answer_protocol import Held, dense_bytes, serve
from held import held_bytes
from transformers import DynamicCache, QuantizedCache

AXES = {"quanto": 0, "hqq": 1}
HQQ_TOKENS = 8
"""HQQ packs whole bytes of rows and fails on other lengths, so what is over is read after the rest and stays dense."""


def read(model: Any, ids: torch.Tensor, share: float | None, *, backend: str | None, bits: int) -> Held:
    if backend is None:
        cache: Any = DynamicCache(config=model.config)
    else:
        axis = AXES[backend]
        cache = QuantizedCache(
            backend, model.config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=128
        )
    whole = ids.shape[1] - (ids.shape[1] % HQQ_TOKENS if backend == "hqq" else 0)
    started = time.perf_counter()
    for part in ids.split([whole, ids.shape[1] - whole], dim=1):
        if part.shape[1]:
            model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    prefill_s = time.perf_counter() - started
    working = dense_bytes(model, ids.shape[1], layers=1) if backend else 0
    return Held(
        cache=cache,
        num_tokens=ids.shape[1],
        prefill_s=prefill_s,
        compress_s=0.0,
        kv_bytes_peak=held_bytes(cache) + working,
        working_bytes=working,
    )


METHODS = {
    "dynamic": partial(read, backend=None, bits=16),
    "quanto4": partial(read, backend="quanto", bits=4),
    "quanto2": partial(read, backend="quanto", bits=2),
    "hqq4": partial(read, backend="hqq", bits=4),
    "hqq2": partial(read, backend="hqq", bits=2),
}

if __name__ == "__main__":
    serve(METHODS, ("transformers", "optimum-quanto", "hqq", "torch"))
