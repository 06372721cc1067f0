"""What the driver and its workers say to each other: one JSON request on stdin, one JSON answer on stdout.

A worker measures one configuration of one engine and ends, so that its peak memory is of that configuration alone. This file
needs nothing but the standard library: it is imported under every engine's own Python.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

WARMUP = 4
"""Decode steps after the prompts that are not counted."""


class Skipped(Exception):
    """This configuration does not exist here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure. prompts: token ids, rows of one length. steps: decode steps to count, after `WARMUP` others."""

    configuration: str
    prompts: list[list[int]]
    steps: int
    threads: int
    hf_folder: str
    """The model as a Hugging Face folder."""
    gguf_folder: str
    """Holds `f16.gguf`, `q8_0.gguf` and `q4_1.gguf` of the same model."""

    @property
    def rows(self) -> int:
        return len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompts[0])

    @property
    def decode_tokens(self) -> int:
        """Tokens that each row makes: one at the end of the prompt, then one a step."""
        return 1 + WARMUP + self.steps

    @property
    def held_tokens(self) -> int:
        """Tokens in the caches of all rows at the end; the last token made is not in them yet."""
        return self.rows * (self.prompt_tokens + self.decode_tokens - 1)

    @property
    def kv_elements_per_token(self) -> int:
        config = json.loads((Path(self.hf_folder) / "config.json").read_text("utf-8"))
        return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Of one decode: seconds until every row had its first token, seconds of each counted step, tokens `[rows][n]`."""

    prefill_s: float
    step_s: list[float]
    tokens: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was measured. Seconds are wall time and of the whole batch."""

    engine: str
    """Name and version."""
    weights: str
    compute: str
    """What activations are computed in."""
    kv: str
    """Format of keys and values."""
    timeline: Timeline
    kv_bytes: int
    """Held by keys and values at the end of the measurement."""
    kv_bytes_from: str
    """`measured` on tensors, `reported` by the engine, or the layout that they were computed from."""
    differs: str = ""
    """What is not as in the other rows."""


Measure = Callable[[Request], Answer]


def decode_rows(step: Callable[[], Sequence[Sequence[int]]], request: Request) -> Timeline:
    """Runs an engine step by step until all rows have decoded `WARMUP + steps` times together.

    step: one step of the engine, which may still be reading prompts; returns the new tokens of each row. Rows whose prompt
    is read early may decode while others are read; such steps are not counted.
    """
    tokens: list[list[int]] = [[] for _ in request.prompts]
    times = [time.perf_counter()]
    together = 0
    while together <= WARMUP + request.steps:
        ready = all(tokens)
        new = step()
        for row, more in zip(tokens, new, strict=True):
            row.extend(more)
        if not all(tokens):
            continue
        if ready and not all(new):
            raise RuntimeError(f"a row made no token in a step of its decoding: {[len(more) for more in new]}")
        times.append(time.perf_counter())
        together += 1
    return Timeline(
        prefill_s=times[1] - times[0],
        step_s=[b - a for a, b in pairwise(times[1 + WARMUP :])],
        tokens=[row[: request.decode_tokens] for row in tokens],
    )


def serve(configurations: Mapping[str, Measure]) -> None:
    """The main function of a worker. With `--list` it prints the names of its configurations, one a line."""
    if "--list" in sys.argv[1:]:
        print("\n".join(configurations))
        return
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines print where they like; standard output is for the answer
    request = Request(**json.load(sys.stdin))
    try:
        reply = asdict(configurations[request.configuration](request))
    except Skipped as skipped:
        reply = {"skipped": str(skipped)}
    reply["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    json.dump(reply, replies)
    replies.flush()
    os._exit(0)  # some engines hang or crash while they are torn down; the measurement is complete
