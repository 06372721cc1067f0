"""vLLM's CPU build: the engine in this process, stepped from here; compiled as it is by default."""

from __future__ import annotations

import os
import sys
from functools import partial
from math import ceil
from pathlib import Path

from peer_protocol import Answer, Request, decode_rows, serve

BLOCK_TOKENS = 128
POSITIONS = 8192
BYTES = {"auto": 2, "fp8": 1}


def measure(request: Request, *, kv: str) -> Answer:
    blocks = request.rows * ceil(request.held_tokens / request.rows / BLOCK_TOKENS)
    kv_bytes = blocks * BLOCK_TOKENS * request.kv_elements_per_token * BYTES[kv]
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process: its steps can be timed and its memory is all there is
        VLLM_CPU_KVCACHE_SPACE=str(1 + ceil(kv_bytes / 2**30)),
        VLLM_CACHE_ROOT=str(Path(sys.prefix) / "cache"),
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=request.hf_folder,
        dtype="bfloat16",
        kv_cache_dtype=kv,
        max_model_len=POSITIONS,
        max_num_seqs=max(8, request.rows),  # what is compiled depends on it
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    engine = llm.llm_engine
    # more tokens than are waited for: rows read early go on while others are read
    max_tokens = min(4 * request.decode_tokens + 64, POSITIONS - request.prompt_tokens)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(request.prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
    made = [0] * request.rows

    def step() -> list[list[int]]:
        new: list[list[int]] = [[] for _ in made]
        for output in engine.step():
            i, ids = int(output.request_id), list(output.outputs[0].token_ids)
            new[i], made[i] = ids[made[i] :], len(ids)
        return new

    return Answer(
        engine=f"vLLM {vllm.__version__} (CPU build)",
        weights="bfloat16",
        compute="bfloat16",
        kv="bfloat16" if kv == "auto" else "fp8 e4m3",
        timeline=decode_rows(step, request),
        kv_bytes=kv_bytes,
        kv_bytes_from=f"layout: blocks of {BLOCK_TOKENS} tokens in use x {8 * BYTES[kv]} bits an element",
        differs="attention computes in bfloat16",
    )


if __name__ == "__main__":
    serve({"bfloat16 KV": partial(measure, kv="auto"), "fp8 KV": partial(measure, kv="fp8")})
