"""Decoding from shorthand against dense memory, in one process: the attention alone, and whole steps of generate().

1. Decode attention over 8 rows x 4,096 tokens (Hkv 3, G 3, D 64), one thread: pages against PyTorch's SDPA over the
   same tokens in bfloat16, in its fastest form. Contenders take turns; medians of the repeats.
2. `model.generate` on a batch of 8 prompts of 4,096 tokens: the seconds of one decode step with `int4 @ 100%` against
   transformers' DynamicCache, same model, dtype and threads. Medians of the steps after the first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import steno
from steno.kernels.attention import DenseSpan, PageSpan, SpanTable, attend
from steno.kernels.quant import encode_pages
from steno.types import PAGE_TOKENS, PageFormat


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def medians(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median and half the spread between the quartiles, seconds; one turn each per repeat."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(repeats):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: (statistics.median(x), _half_spread(x)) for name, x in times.items()}


def _half_spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def attention_contenders(rows: int, tokens: int, heads: int, group: int, dim: int) -> dict[str, Callable[[], object]]:
    """Decode attention of one query per row and head, over the same tokens in every format."""
    torch.manual_seed(0)
    keys, values = (torch.randn(rows, heads, tokens, dim) for _ in range(2))
    query = torch.randn(rows, heads * group, 1, dim)
    scale = dim**-0.5
    k16, v16, q16 = keys.bfloat16(), values.bfloat16(), query.bfloat16()
    grouped = q16.view(rows, heads, group, dim)  # one query per head: the group can stand in for query tokens
    repeated = [x.repeat_interleave(group, dim=1) for x in (k16, v16)]
    contenders: dict[str, Callable[[], object]] = {
        "SDPA bf16, enable_gqa": lambda: F.scaled_dot_product_attention(q16, k16, v16, scale=scale, enable_gqa=True),
        "SDPA bf16, group as tokens": lambda: F.scaled_dot_product_attention(grouped, k16, v16, scale=scale),
        "SDPA bf16, heads repeated": lambda: F.scaled_dot_product_attention(q16, *repeated, scale=scale),
        "SDPA fp32, enable_gqa": lambda: F.scaled_dot_product_attention(
            query, keys, values, scale=scale, enable_gqa=True
        ),
    }
    empty = torch.empty(0, dim)
    dense = [[[DenseSpan(k16[b, h], v16[b, h])] for h in range(heads)] for b in range(rows)]
    tables = {"steno bf16": SpanTable.build(dense, head_dim=dim)}
    for bits in (8, 4, 2):
        spans = []
        for b in range(rows):
            pages = [
                encode_pages(
                    keys[b, h].view(-1, PAGE_TOKENS, dim),
                    values[b, h].view(-1, PAGE_TOKENS, dim),
                    PageFormat(bits=bits),
                )
                for h in range(heads)
            ]
            spans.append([[PageSpan(p), DenseSpan(empty, empty)] for p in pages])
        tables[f"steno int{bits}"] = SpanTable.build(spans, head_dim=dim)
    for name, table in tables.items():
        contenders[name] = lambda table=table: attend(query, table, scale=scale, impl="cpu", num_threads=1)
    return contenders


class Stopwatch(LogitsProcessor):
    """Notes the time of each step of generate()."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def generate_steps(
    lm: steno.LanguageModel, cache: Any, ids: torch.Tensor, steps: int
) -> tuple[list[float], torch.Tensor]:
    """Seconds of each decode step of generate(), and the tokens."""
    watch = Stopwatch()
    out = lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=steps + 1,
        min_new_tokens=steps + 1,
        do_sample=False,
        logits_processor=LogitsProcessorList([watch]),
        pad_token_id=0,
    )
    return [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)], out[:, ids.shape[1] :]


def prompts(lm: steno.LanguageModel, rows: int, tokens: int) -> torch.Tensor:
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = lm.tokenize(text[: 8 * rows * tokens])
    return torch.tensor(ids[: rows * tokens]).view(rows, tokens)


def bench_attention(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shape = (arguments.rows, arguments.tokens, 3, 3, 64)
    results = medians(attention_contenders(*shape), arguments.repeats)
    torch.set_num_threads(threads)
    base = min(median for name, (median, _) in results.items() if name.startswith("SDPA bf16"))
    print(
        f"\ndecode attention, {shape[0]} rows x {shape[1]} tokens, Hkv 3, G 3, D 64, one thread, "
        f"median of {arguments.repeats}; times against the fastest form of SDPA bf16"
    )
    rows = []
    for name, (median, spread) in results.items():
        print(f"  {name:28} {median * 1e3:8.2f} ms ± {spread * 1e3:5.2f}   {base / median:6.2f} times")
        rows.append(
            {"what": "attention", "name": name, "median_s": median, "spread_s": spread, "speedup": base / median}
        )
    return rows


def bench_generate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    lm = steno.load(arguments.model)
    ids = prompts(lm, arguments.rows, arguments.tokens)
    print(f"\ngenerate(), batch {arguments.rows} x {arguments.tokens} tokens, {lm.name} {lm.model.dtype}, "
          f"{torch.get_num_threads()} threads, median of {arguments.steps - 1} steps")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name in ("DynamicCache (sdpa)", *arguments.recipe):
        ours = name != "DynamicCache (sdpa)"
        lm.model.set_attn_implementation("steno" if ours else "sdpa")
        cache: Any = steno.KVCache(lm.model.config, name) if ours else DynamicCache(config=lm.model.config)
        times, _ = generate_steps(lm, cache, ids, arguments.steps)
        median, spread = statistics.median(times[1:]), _half_spread(times[1:])
        held = cache.kv_bytes if ours else sum(2 * layer.keys.nbytes for layer in cache.layers)
        base = rows[0]["median_s"] if rows else median
        print(
            f"  {name:28} {median * 1e3:8.1f} ms ± {spread * 1e3:5.1f}   {base / median:6.2f} times   "
            f"{held / 1e6:9.1f} MB held"
        )
        rows.append({"what": "generate", "name": name, "median_s": median, "spread_s": spread, "speedup": base / median,
                     "kv_bytes": held})  # fmt: skip
        del cache
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15, help="of the attention")
    parser.add_argument("--steps", type=int, default=9, help="of generate()")
    parser.add_argument("--recipe", action="append", help="repeatable; default: int4 @ 100%%")
    parser.add_argument("--only", choices=["attention", "generate"])
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON lines")
    arguments = parser.parse_args()
    arguments.recipe = arguments.recipe or ["int4 @ 100%"]
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}")
    rows = []
    if arguments.only != "generate":
        rows += bench_attention(arguments)
    if arguments.only != "attention":
        rows += bench_generate(arguments)
    if arguments.json:
        common = {"cpu": cpu_name(), "date": str(date.today()), "rows": arguments.rows, "tokens": arguments.tokens}
        Path(arguments.json).write_text("".join(json.dumps(common | row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
