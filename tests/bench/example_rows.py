"""Rows as a run makes them, without a model: three recipes on a needle grid, text and odd prompts."""

from __future__ import annotations

import random

from steno.bench.rows import Row
from steno.bench.stats import difference_interval, mean_interval

RECIPES = {
    "full": (1.0, 1.0),
    "snapkv(window=16) @ 25%": (0.25, 0.3),
    "kvzip | adakv | kivi(bits=4) @ 50%": (0.09, 0.95),
}
COUNT = 20


def example_row(
    recipe: str, task: str, context: int, *, scores: list[float] | None = None, seed: int = 0, **changes: object
) -> Row:
    """One row; `changes` replace fields."""
    share, quality = RECIPES.get(recipe, (0.5, 0.5))
    rng = random.Random(f"{recipe} {task} {context} {seed}")
    full_scores = [1.0] * (COUNT - 1) + [0.0]
    if scores is None:
        scores = full_scores if recipe == "full" else [float(rng.random() < quality) for _ in range(COUNT)]
    score, difference = mean_interval(scores), difference_interval(scores, full_scores)
    full = context * 46_080
    is_full = recipe == "full"
    values: dict[str, object] = {
        "model": "smollm2-135m", "model_hash": "0123456789abcdef", "dtype": "float32", "device": "cpu", "recipe": recipe,
        "task": task, "protocol": "none" if task == "perplexity" else "unseen", "context_tokens": context,
        "sized": task != "stress", "samples": len(scores), "seed": seed, "instances": f"{task}-{context}-{seed}",
        "score": score.value, "score_low": score.low, "score_high": score.high, "score_interval": f"{score.method} 95 %",
        "score_full": sum(full_scores) / COUNT, "difference": difference.value, "difference_low": difference.low,
        "difference_high": difference.high, "difference_interval": "newcombe 95 %, paired",
        "kl": 0.0 if is_full else 1 - quality, "kl_low": 0.0 if is_full else (1 - quality) / 2,
        "kl_high": 0.0 if is_full else 2 - 2 * quality, "top1_agreement": quality, "perplexity": None,
        "prompt_tokens": context - 60.0, "new_tokens": 12.0, "refused": 0, "frees_memory": not is_full,
        "kv_bytes_full": full, "kv_bytes": int(full * share), "kv_bytes_peak": int(full * min(1, share * 1.3)),
        "kv_bytes_end": int(full * share * 1.01), "bits_per_value": 32 * share, "prefill_s": context / 600,
        "prefill_s_quartiles": [context / 620, context / 580], "compress_s": 0.0, "compress_s_quartiles": [0.0, 0.0],
        "ttft_s": 0.2, "ttft_s_quartiles": [0.19, 0.22], "decode_ms_per_token": 20 + 20 * share,
        "decode_ms_per_token_quartiles": [19 + 20 * share, 22 + 20 * share], "scores": scores,
        "scores_full": full_scores[: len(scores)],
        "kls": None if is_full else [(1 - quality) * (0.5 + i / (COUNT - 1)) for i in range(len(scores))],
        "depths": [i / (COUNT - 1) for i in range(len(scores))] if task == "niah" else None, "wall_s": 12.5,
        "measured_at": "2026-11-22T12:00:00+00:00", "versions": {"steno": "0.1.0", "torch": "2.13.0"},
        "git_sha": "0" * 40 + "-dirty", "host": "Some CPU, 2 cores, Linux", "threads": 2,
    }  # fmt: skip
    return Row(**(values | changes))  # type: ignore[arg-type]


def example_rows(seed: int = 0) -> list[Row]:
    cells = [("niah", 1024), ("niah", 2048), ("perplexity", 1024), ("stress", 613)]
    return [example_row(recipe, task, context, seed=seed) for task, context in cells for recipe in RECIPES]
