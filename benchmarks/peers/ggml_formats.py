"""ggml's formats, for the two workers that run llama.cpp."""

from __future__ import annotations

from peer_protocol import Request

WEIGHTS = {
    "f16": "f16 of our bfloat16 weights",
    "q8_0": "q8_0 (8.5 bits) of our bfloat16 weights",
    "q4_1": "q4_1 (5 bits), embedding and head q8_0: what our weights were made from",
}
BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Of one element of a cache: 32 share a 2-byte scale when quantized."""
TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
"""Numbers of `enum ggml_type`."""
REPEATED = "one prompt read, its cache copied to every sequence, in memory of its own"
PAIRS = (
    ("f16", "f16"), ("f16", "q8_0"), ("f16", "q4_0"),
    ("q8_0", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"),
    ("q4_1", "f16"), ("q4_1", "q4_0"),
)  # fmt: skip
"""Weights and cache."""


def name(weights: str, kv: str) -> str:
    return f"{weights} weights, {kv} KV"


def compute(weights: str) -> str:
    return "float32" if weights == "f16" else "float32; inputs of matrix products quantized to 8 bits"


def kv_format(kv: str) -> str:
    return kv if kv == "f16" else f"{kv}, after a Hadamard rotation"


def kv_bytes(request: Request, kv: str) -> int:
    """Of the tokens held; what is allocated beyond them is not counted."""
    return round(request.held_tokens * request.kv_elements_per_token * BYTES[kv])


def slot_tokens(request: Request) -> int:
    """Positions of one sequence, rounded up as llama.cpp does."""
    need = request.prompt_tokens + request.decode_tokens
    return need + -need % 256


def kv_bytes_from(kv: str) -> str:
    return f"layout: tokens held x {BYTES[kv] * 8:g} bits an element"
