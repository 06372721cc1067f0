"""OpenVINO GenAI: the continuous batching pipeline, stepped from here; it reads our GGUF files by itself."""

from __future__ import annotations

from functools import partial

import numpy as np
import openvino
import openvino_genai as genai
from peer_protocol import Answer, Request, decode_rows, serve

WEIGHTS = {"f16": "f16 of our bfloat16 weights", "q8_0": "q8_0 of our bfloat16 weights, as OpenVINO reads it"}
BLOCK_TOKENS = 32


def measure(request: Request, *, weights: str, kv: str, keep: float = 1.0) -> Answer:
    pipeline = genai.ContinuousBatchingPipeline(
        f"{request.gguf_folder}/{weights}.gguf",
        scheduler(request, keep),
        "CPU",
        {"KV_CACHE_PRECISION": kv, "INFERENCE_NUM_THREADS": request.threads},
    )
    generation = genai.GenerationConfig()
    generation.max_new_tokens = request.prompt_tokens  # more than are waited for
    generation.ignore_eos, generation.do_sample = True, False
    handles = [
        pipeline.add_request(i, openvino.Tensor(np.array([prompt], dtype=np.int64)), generation)
        for i, prompt in enumerate(request.prompts)
    ]

    def step() -> list[list[int]]:
        pipeline.step()
        return [
            [token for out in (handle.read().values() if handle.can_read() else ()) for token in out.generated_ids]
            for handle in handles
        ]

    timeline = decode_rows(step, request)
    metrics = pipeline.get_metrics()
    return Answer(
        engine=f"OpenVINO GenAI {genai.__version__}",
        weights=WEIGHTS[weights],
        compute="as the plugin chooses for this CPU",
        kv=kv + (f", eviction to {keep:.0%} of the prompt" if keep < 1 else ""),
        timeline=timeline,
        kv_bytes=round(metrics.kv_cache_size_in_bytes * metrics.cache_usage / 100),
        kv_bytes_from="reported: cache size x share of it in use",
        differs=f"keeps {keep:.0%} of the tokens" if keep < 1 else "",
    )


def scheduler(request: Request, keep: float) -> genai.SchedulerConfig:
    config = genai.SchedulerConfig()
    config.max_num_batched_tokens, config.enable_prefix_caching = 2048, False
    if keep < 1:
        kept = int(request.prompt_tokens * keep) // BLOCK_TOKENS * BLOCK_TOKENS
        config.use_cache_eviction = True
        config.cache_eviction_config = genai.CacheEvictionConfig(
            start_size=BLOCK_TOKENS,
            recent_size=2 * BLOCK_TOKENS,
            max_cache_size=kept,
            aggregation_mode=genai.AggregationMode.NORM_SUM,
        )
    return config


if __name__ == "__main__":
    serve({
        "f16 weights, f16 KV": partial(measure, weights="f16", kv="f16"),
        "f16 weights, u8 KV": partial(measure, weights="f16", kv="u8"),
        "f16 weights, u4 KV": partial(measure, weights="f16", kv="u4"),
        "q8_0 weights, u8 KV": partial(measure, weights="q8_0", kv="u8"),
        "f16 weights, u8 KV, eviction 50%": partial(measure, weights="f16", kv="u8", keep=0.5),
    })  # fmt: skip
