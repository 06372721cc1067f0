"""llama.cpp through its C interface: the prebuilt library of node-llama-cpp, whose CPU backend fits itself to the machine."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import ggml_formats as ggml
import libllama
from peer_protocol import Answer, Request, Timeline, decode_rows, serve

FOLDER = Path(sys.prefix) / "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"


def measure(request: Request, *, weights: str, kv: str) -> Answer:
    lib = libllama.load(FOLDER)
    context = libllama.Context(
        lib,
        Path(request.gguf_folder) / f"{weights}.gguf",
        sequences=request.rows,
        tokens=ggml.slot_tokens(request),
        kv_type=ggml.TYPES[kv],
        threads=request.threads,
    )
    features = lib.llama_print_system_info().decode()
    return Answer(
        engine=f"llama.cpp {libllama.VERSION}{', AVX-512 build' if 'AVX512 = 1' in features else ''}",
        weights=ggml.WEIGHTS[weights],
        compute=ggml.compute(weights),
        kv=ggml.kv_format(kv),
        timeline=decode(context, request),
        kv_bytes=ggml.kv_bytes(request, kv),
        kv_bytes_from=ggml.kv_bytes_from(kv),
        differs=ggml.REPEATED if request.rows > 1 else "",
    )


def decode(context: libllama.Context, request: Request) -> Timeline:
    tokens: list[int] = []
    position = request.prompt_tokens

    def step() -> list[list[int]]:
        nonlocal tokens, position
        if not tokens:
            tokens = [context.read(request.prompts[0])] * request.rows
            context.copy(request.rows)
        else:
            tokens = context.step(tokens, position)
            position += 1
        return [[token] for token in tokens]

    timeline = decode_rows(step, request)
    return Timeline(prefill_s=timeline.prefill_s, step_s=timeline.step_s, tokens=timeline.tokens[:1])


if __name__ == "__main__":
    serve({ggml.name(weights, kv): partial(measure, weights=weights, kv=kv) for weights, kv in ggml.PAIRS})
