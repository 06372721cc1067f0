"""Where one decode step goes: milliseconds and share of the linear layers, the attention, the rest of the model, the loop.

Each part is timed from outside, with what is timed inside of it taken off; "the rest of the forward pass" is what is left:
residuals, reshapes and Python between the parts. The loop of `steno` decodes one row; `generate()` any number. Medians of
the steps after the first two. The last line is the same step without the stopwatches, whose own cost is the difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
# transformers looks for a package `kernels` and must not find this folder's kernels.py
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

import torch
from benchmarks.common import OtherLoad, cpu_name, prompts
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

import steno
from steno.cache.layer import LayerCache
from steno.decode.loop import decode_steps
from steno.decode.sampler import GREEDY
from steno.kernels import native

WARM_UP = 2
LOOP, REST = "sampling and the loop", "the rest of the forward pass"


class Ledger:
    """Seconds per part of the step that runs; a part stops the clock of the one it was called from."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = [defaultdict(float)]
        self.stack, self.since = [LOOP], time.perf_counter()

    def charge(self) -> None:
        now = time.perf_counter()
        self.steps[-1][self.stack[-1]] += now - self.since
        self.since = now

    def next_step(self) -> None:
        self.charge()
        self.steps.append(defaultdict(float))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            self.stack.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.charge()
                self.stack.pop()

        return run

    def medians(self) -> dict[str, float]:
        steps = self.steps[WARM_UP + 1 : -1]
        return {part: statistics.median(step[part] for step in steps) for part in steps[0]}


@contextmanager
def watching(model: Any, ledger: Ledger) -> Iterator[None]:
    """Within it every part of the model reports to the ledger."""
    code, library = sys.modules[type(model).__module__], native.library()
    with ExitStack() as stack:

        def watch(part: str, owner: Any, name: str) -> None:
            if hasattr(owner, name):
                stack.enter_context(patch.object(owner, name, ledger.timed(part, getattr(owner, name))))

        watch(REST, model, "forward")
        watch("rotation (rope)", code, "apply_rotary_pos_emb")
        watch("mask", code, "create_causal_mask")
        watch("cache around the kernel", LayerCache, "update")
        stack.enter_context(patch.object(LayerCache, "attend", _method(ledger, LayerCache.attend)))
        for name in [name for name in vars(library) if name.startswith("steno_")]:
            watch("native kernels", library, name)
        for path, module in model.named_modules():
            kind = type(module).__name__
            if kind.endswith("Linear"):
                watch("output head" if path == "lm_head" else "linear layers", module, "forward")
            elif kind.endswith("Norm"):
                watch("norms", module, "forward")
            elif kind.endswith("RotaryEmbedding"):
                watch("rotation (rope)", module, "forward")
            elif isinstance(module, nn.SiLU) or kind.endswith("MLP") or "Activation" in kind:
                watch("activation and product of the MLP", module, "forward")
        yield


def _method(ledger: Ledger, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: ledger.timed("cache around the kernel", function)(self, *args, **kwargs)


class Clock(LogitsProcessor):
    """Tells the end of each forward pass of generate()."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tick()
        return scores


def by_generate(lm: steno.LanguageModel, ids: torch.Tensor, recipe: str, steps: int, tick: Callable[[], None]) -> None:
    lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=steno.KVCache(lm.model.config, recipe),
        max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0,
        logits_processor=LogitsProcessorList([Clock(tick)]),
    )  # fmt: skip


def by_loop(lm: steno.LanguageModel, ids: torch.Tensor, recipe: str, steps: int, tick: Callable[[], None]) -> None:
    cache = steno.KVCache(lm.model.config, recipe)
    for _ in decode_steps(lm.model, cache, ids[0].tolist(), sampler=GREEDY.sampler(), max_new_tokens=steps):
        tick()


def profile(lm: steno.LanguageModel, ids: torch.Tensor, recipe: str, steps: int, path: str) -> dict[str, Any]:
    run = by_loop if path == "loop" else by_generate
    times: list[float] = []
    run(lm, ids, recipe, steps, lambda: times.append(time.perf_counter()))
    plain = statistics.median(b - a for a, b in list(zip(times, times[1:], strict=False))[WARM_UP:])
    ledger = Ledger()
    with watching(lm.model, ledger):
        run(lm, ids, recipe, steps, ledger.next_step)
    return {"path": path, "rows": len(ids), "tokens": ids.shape[1], "plain_s": plain, "parts_s": ledger.medians()}


def show(result: dict[str, Any]) -> None:
    parts = result["parts_s"]
    total = sum(parts.values())
    print(f"\n{result['path']}, batch {result['rows']}, {result['tokens']} tokens")
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {part:36} {seconds * 1e3:8.2f} ms  {100 * seconds / total:5.1f} %")
    print(f"  {'sum':36} {total * 1e3:8.2f} ms")
    print(f"  {'a step without stopwatches':36} {result['plain_s'] * 1e3:8.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", help="fp16, int8 or int4; default: as the model computes")
    parser.add_argument("--recipe", default="int4 @ 100%")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--path", choices=["loop", "generate"], help="default: both")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON lines")
    arguments = parser.parse_args()
    lm = steno.load(arguments.model, weights=arguments.weights)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {lm.name} {lm.model.dtype}, "
          f"weights {arguments.weights or 'as computed'}, recipe {arguments.recipe}")  # fmt: skip
    results, load = [], OtherLoad()
    for rows in arguments.rows:
        for tokens in arguments.tokens:
            for path in (arguments.path,) if arguments.path else ("loop", "generate"):
                if path == "loop" and rows > 1:
                    continue
                results.append(
                    profile(
                        lm, torch.tensor(prompts(lm.tokenize, rows, tokens)), arguments.recipe, arguments.steps, path
                    )
                )
                show(results[-1])
    print(f"\nother processes kept {load.cores() or 0:.2f} cores busy")
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")


if __name__ == "__main__":
    main()
