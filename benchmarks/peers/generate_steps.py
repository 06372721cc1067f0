"""The time of each step of transformers' `generate()`, for the two workers that run on it."""

from __future__ import annotations

import time
from typing import Any

import torch
from peer_protocol import WARMUP, Request, Timeline
from transformers import LogitsProcessor, LogitsProcessorList


class Stopwatch(LogitsProcessor):
    """Notes when each step of generate() has its logits."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def generate(model: Any, cache: Any, ids: torch.Tensor, request: Request) -> Timeline:
    """Greedy decoding after `ids` `[B, S]`; what of them is in the cache already is not read again."""
    watch = Stopwatch()
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=request.decode_tokens,
        min_new_tokens=request.decode_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([watch]),
        pad_token_id=0,
    )
    times = watch.times[WARMUP:]
    return Timeline(
        prefill_s=watch.times[0] - started,
        step_s=[b - a for a, b in zip(times, times[1:], strict=False)],
        tokens=out[:, ids.shape[1] :].tolist(),
    )
