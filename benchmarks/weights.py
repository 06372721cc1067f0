"""What fewer bits per weight gain and lose: seconds of a decode step and of a prefill, and the distance of the answers.

Time: steps of the model after prompts of `--tokens` under `--recipe`, medians.
Loss: next-token distributions over `--text-tokens` tokens of the language reference, in windows of 512, against the same
model without `weights`: perplexity, mean and largest Kullback-Leibler divergence in nats, share of equal first choices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# transformers looks for a package `kernels` and must not find this folder's kernels.py
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

import torch
from benchmarks.common import OtherLoad, cpu_name, prompts

import steno

WINDOW = 512


def distributions(lm: steno.LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[n, WINDOW - 1, V]` of the tokens that follow, for windows `[n, WINDOW]`."""
    with torch.inference_mode():
        rows = [lm.model(row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1) for row in ids]
    return torch.stack(rows)


def compare(full: torch.Tensor, other: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    kl = (full.exp() * (full - other)).sum(-1)
    loss = -other.gather(-1, ids[:, 1:, None]).mean()
    agree = (full.argmax(-1) == other.argmax(-1)).float().mean()
    return {"perplexity": loss.exp().item(), "kl_mean": kl.mean().item(), "kl_max": kl.max().item(),
            "top1": agree.item()}  # fmt: skip


def step_times(lm: steno.LanguageModel, ids: torch.Tensor, recipe: str, steps: int) -> dict[str, float]:
    """Seconds of the prefill and of a step."""
    cache, token, times = steno.KVCache(lm.model.config, recipe), ids[:, -1:], []
    with torch.inference_mode():
        for tokens in (ids, *[token] * (steps + 2)):
            started = time.perf_counter()
            lm.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            times.append(time.perf_counter() - started)
    return {"prefill_s": times[0], "step_s": statistics.median(times[3:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", nargs="+", default=["bf16", "fp16", "int8", "int4"])
    parser.add_argument("--recipe", default="int4 @ 100%")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--text-tokens", type=int, default=1024)
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON lines")
    arguments = parser.parse_args()
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; steps after {arguments.tokens} "
          f"tokens, {arguments.recipe}, median of {arguments.steps}")  # fmt: skip
    results: list[dict[str, Any]] = []
    full, load = None, OtherLoad()
    for name in (None, *arguments.weights):
        lm = steno.load(arguments.model, weights=name)
        windows = torch.tensor(prompts(lm.tokenize, arguments.text_tokens // WINDOW, WINDOW))
        found = distributions(lm, windows)
        full = found if full is None else full
        result: dict[str, Any] = {"weights": name or "as computed", **compare(full, found, windows)}
        for rows in arguments.rows:
            ids = torch.tensor(prompts(lm.tokenize, rows, arguments.tokens))
            result |= {f"{key}_{rows}": x for key, x in step_times(lm, ids, arguments.recipe, arguments.steps).items()}
        results.append(result)
        times = "  ".join(f"B={b} {result[f'step_s_{b}'] * 1e3:6.1f} ms" for b in arguments.rows)
        last = arguments.rows[-1]
        print(f"{result['weights']:12} {times}  prefill of {last} x {arguments.tokens} {result[f'prefill_s_{last}']:.2f} s"
              f"  ppl {result['perplexity']:.3f}  KL {result['kl_mean']:.5f} (max {result['kl_max']:.3f})  "
              f"same first choice {100 * result['top1']:.1f} %", flush=True)  # fmt: skip
    print(f"other processes kept {load.cores() or 0:.2f} cores busy")
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")


if __name__ == "__main__":
    main()
