"""llama.cpp through the `xllamacpp` wheel: its server in process, one slot a row, prompts as token ids.

The wheel shows nothing below the server and is built for AVX2. A step's time is the time between the arrivals of a row's
tokens: one pass over all slots, sampling, log-probabilities and streaming included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import ggml_formats as ggml
import xllamacpp
from peer_protocol import WARMUP, Answer, Request, Timeline, serve


def measure(request: Request, *, weights: str, kv: str) -> Answer:
    return Answer(
        engine=f"llama.cpp server, xllamacpp {xllamacpp.__version__} (AVX2 build)",
        weights=ggml.WEIGHTS[weights],
        compute=ggml.compute(weights),
        kv=ggml.kv_format(kv),
        timeline=complete(start_server(request, weights, kv), request),
        kv_bytes=ggml.kv_bytes(request, kv),
        kv_bytes_from=ggml.kv_bytes_from(kv),
        differs=(f"{ggml.REPEATED}; " if request.rows > 1 else "") + "log-probability of each token included",
    )


def start_server(request: Request, weights: str, kv: str) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = f"{request.gguf_folder}/{weights}.gguf"
    params.n_ctx, params.n_parallel = ggml.slot_tokens(request) * request.rows, request.rows
    params.kv_unified = False
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kv.upper()}")
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request.threads
    params.cache_ram_mib, params.fit_params = 0, False
    return xllamacpp.Server(params)


def complete(server: Any, request: Request) -> Timeline:
    times: list[list[float]] = [[] for _ in request.prompts]
    tokens: list[list[int]] = [[] for _ in request.prompts]

    def on_chunk(chunk: Mapping[str, Any]) -> bool:
        now = time.perf_counter()
        if "choices" not in chunk:
            raise RuntimeError(f"the server answered {chunk}")
        for choice in chunk["choices"]:
            if choice.get("logprobs"):
                times[choice["index"]].append(now)
                tokens[choice["index"]].append(choice["logprobs"]["content"][0]["id"])
        return False

    body = {
        "prompt": request.prompts[0],
        "n": request.rows,  # the server copies the cache of the prompt to n slots
        "max_tokens": request.decode_tokens,
        "stream": True,
        "logprobs": 1,  # the only way to the ids of tokens
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    started = time.perf_counter()
    server.handle_completions(body, on_chunk)
    if any(len(row) != request.decode_tokens for row in tokens):
        raise RuntimeError(f"each row must make {request.decode_tokens} tokens; made {[len(row) for row in tokens]}")
    last = [max(column) for column in zip(*times, strict=True)]  # a step is over when its last row has arrived
    return Timeline(prefill_s=last[0] - started, step_s=[b - a for a, b in pairwise(last[WARMUP:])], tokens=tokens[:1])


if __name__ == "__main__":
    pairs = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_1", "q4_0"))
    serve({ggml.name(weights, kv): partial(measure, weights=weights, kv=kv) for weights, kv in pairs})
