"""Whole decode steps of `generate()`: tokens per second and KV bytes over batch and context, recipes against DynamicCache.

A contender reads each prompt once, as one row; every batch is that row copied, each copy in memory of its own (checked on
the storages), so a step reads as many bytes as rows that were read apart. Rows are appended to --json as they finish; with
--resume, those that are there from the same machine are not measured again. A batch that would not fit in the free memory
is a row with `skipped`. Times are of one step of the whole batch, after 4 steps that are not counted; `others_load` is how
many cores other processes kept busy meanwhile: where it is not near 0, the times say little.

Contenders are recipes, run in the dtype that steno.load chooses on this machine, and transformers' own caches with SDPA,
DynamicCache and, at 8 x 4,096 alone and where optimum-quanto is installed, QuantizedCache of 4 bits, each in float32 and in
bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# transformers looks for a package `kernels` and must not find this folder's kernels.py
sys.path[:] = [str(HERE.parent), str(HERE / "peers"), *(p for p in sys.path if Path(p).resolve() != HERE)]

import torch
from benchmarks.common import (
    OtherLoad,
    Row,
    append_row,
    cpu_name,
    free_bytes,
    latest,
    notice,
    prompts,
    quartiles,
    read_rows,
    today,
)
from generate_steps import generate
from peer_protocol import Request
from run_steno import replay
from run_transformers import held_bytes, quantized
from transformers import DynamicCache
from transformers.utils import is_optimum_quanto_available

import steno
from steno.cache.transformed import MatrixBasis
from steno.methods.transform.hadamard import hadamard_basis
from steno.types import Need

HOSTS = ("DynamicCache bfloat16", "DynamicCache float32", "QuantizedCache bfloat16", "QuantizedCache float32")
WEIGHTS = " weights"
RECIPES = (
    "full",
    "int4 @ 100%",
    "snapkv | adakv | kivi(bits=4) @ 50%",
    "kvzip | adakv | kivi(bits=4) @ 50%",
    "snapkv | adakv | kivi(bits=4) @ 25%",
)
QUANTIZED_SHAPE = (8, 4096)
REPLAY_ROOM = 512
"""Positions that stay free for a recipe that replays its context behind itself."""
KEY = ("contender", "batch", "context", "model", "cpu", "threads")
"""What makes two rows the same measurement."""


class Skipped(Exception):
    """This shape is not measured here; the message says why."""


class Models:
    """The model in the dtypes asked for, each loaded when it is first needed, the one before let go."""

    def __init__(self, source: str) -> None:
        # None: steno's choice
        self.load = lru_cache(maxsize=1)(lambda dtype, weights: steno.load(source, dtype=dtype, weights=weights))

    def of(self, contender: str) -> steno.LanguageModel:
        lm = self.load(contender.split()[-1], None) if contender in HOSTS else self.load(None, split(contender)[1])
        lm.model.set_attn_implementation("sdpa" if contender in HOSTS else "steno")
        return lm


def split(contender: str) -> tuple[str, str | None]:
    """The recipe of a contender, and the format of the weights where it is not the model's own."""
    recipe, _, weights = contender.removesuffix(WEIGHTS).rpartition(", ")
    return (recipe, weights) if contender.endswith(WEIGHTS) else (contender, None)


def prompt(lm: steno.LanguageModel, contender: str, context: int, new_tokens: int) -> torch.Tensor:
    """Token ids `[1, S]` of the language reference: `context` of them, or as many as leave room for what follows."""
    room = lm.loaded.max_positions - new_tokens if lm.loaded.max_positions else context
    if contender not in HOSTS and Need.REPLAY in steno.parse_recipe(split(contender)[0]).needs:
        room -= REPLAY_ROOM
    return torch.tensor(prompts(lm.tokenize, 1, min(context, room)))


def read(lm: steno.LanguageModel, contender: str, ids: torch.Tensor) -> Any:
    """A cache of one row that has read all of `ids` but the last token."""
    if contender in HOSTS:
        cache: Any = DynamicCache(config=lm.model.config)
    else:
        cache = steno.KVCache(lm.model.config, split(contender)[0])
        if Need.REPLAY in cache.recipe.needs:
            replay(lm, cache, ids)
            return cache
    with torch.inference_mode():
        lm.model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def repeated(contender: str, single: Any, config: Any, batch: int) -> Any:
    """A cache of `batch` rows like that of `single`, which stays as it is; no two rows share memory."""
    if isinstance(single, steno.KVCache):
        cache: Any = single.fork()
        cache.batch_repeat_interleave(batch)
        for layer in cache.own_layers:
            layer.content.rows = [_copied(row) for row in layer.content.rows]
            layer.content = layer.content.select(list(range(batch)), layer.reading.shared)  # a table of the copies
    elif contender.startswith("QuantizedCache"):
        return quantized(copy.deepcopy(single), config, "quanto", batch)
    else:
        cache = copy.deepcopy(single)
        cache.batch_repeat_interleave(batch)
    held, expected = kv_bytes(cache), batch * kv_bytes(single)
    if held < 0.99 * expected:
        raise RuntimeError(f"{batch} rows of {contender!r} must hold about {expected} bytes; they hold {held}.")
    return cache


def _copied(row: Any) -> Any:
    """A row in memory of its own, but for a basis that is no sequence's own: those that read apart share it, too."""
    matrices = [basis for basis in row.bases if isinstance(basis, MatrixBasis)]
    shared = [
        b for b in matrices if b is hadamard_basis(len(b.key_matrix[0]), len(b.value_matrix[0]), b.key_matrix.device)
    ]
    return copy.deepcopy(row, {id(basis): basis for basis in shared})


def kv_bytes(cache: Any) -> int:
    return int(cache.kv_bytes) if isinstance(cache, steno.KVCache) else held_bytes(cache)


def measure(
    lm: steno.LanguageModel, contender: str, single: Any, ids: torch.Tensor, batch: int, request: Request
) -> Row:
    """The steps of one shape."""
    growing = 1.2  # while a layer of DynamicCache grows, it is there twice
    needed = int(growing * batch * kv_bytes(single))
    available = free_bytes()
    if available is not None and needed > available:
        raise Skipped(f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free")
    cache = repeated(contender, single, lm.model.config, batch)
    others = OtherLoad()
    timeline = generate(lm.model, cache, ids.repeat(batch, 1), request)
    low, median, high = quartiles(timeline.step_s)
    return {
        "dtype": str(lm.model.dtype).removeprefix("torch."), "tokens": ids.shape[1],
        "steps": len(timeline.step_s), "median_s": median, "low_s": low, "high_s": high,
        "tokens_per_s": batch / median, "kv_bytes": kv_bytes(cache), "others_load": others.cores(),
    }  # fmt: skip


def bench(models: Models, args: argparse.Namespace, done: set[tuple[Any, ...]], machine: Row) -> Iterator[Row]:
    request = Request(
        configuration="", prompts=[], steps=args.steps, threads=args.threads, hf_folder="", gguf_folder=""
    )
    for contender in args.contender:
        for context in args.context:
            batches = []
            for batch in args.batch:
                row = machine | {"contender": contender, "batch": batch, "context": context}
                wanted = not contender.startswith("QuantizedCache") or (batch, context) == QUANTIZED_SHAPE
                if wanted and tuple(row[field] for field in KEY) not in done:
                    batches.append((batch, row))
            if not batches:
                continue
            notice(f"{contender}, {context:,} tokens: reading")
            lm = models.of(contender)
            ids = prompt(lm, contender, context, request.decode_tokens)
            started = time.perf_counter()
            single = read(lm, contender, ids)
            read_s = time.perf_counter() - started
            for batch, row in batches:
                try:
                    yield row | {"read_s": read_s} | measure(lm, contender, single, ids, batch, request)
                except Skipped as skipped:
                    yield row | {"skipped": str(skipped)}


def print_row(row: Row) -> None:
    name = f"{row['contender']:38} {row['batch']:3} x {row.get('tokens', row['context']):5,}"
    if "skipped" in row:
        print(f"{name}   {row['skipped']}", flush=True)
        return
    spread = f"[{row['low_s'] * 1e3:.1f}, {row['high_s'] * 1e3:.1f}]"
    others = "" if row["others_load"] is None else f"   others {row['others_load']:.2f}"
    print(
        f"{name} {row['median_s'] * 1e3:9.1f} ms a step {spread:>18} {row['tokens_per_s']:8.1f} tokens/s "
        f"{row['kv_bytes'] / 1e6:9.1f} MB{others}",
        flush=True,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--recipe", action="append", help=f"repeatable; default: {'; '.join(RECIPES)}".replace("%", "%%")
    )
    parser.add_argument(
        "--weights", action="append", help="format of the weights under the recipes, as of steno.load; repeatable"
    )
    parser.add_argument("--host", action="append", choices=HOSTS, help="repeatable; default: all")
    parser.add_argument("--no-host", action="store_true", help="recipes alone")
    parser.add_argument("--batch", action="append", type=int, help="repeatable; default: 1, 4, 8 and 16")
    parser.add_argument("--context", action="append", type=int, help="repeatable; default: 1024, 2048, 4096 and 8192")
    parser.add_argument("--steps", type=int, default=9, help="decode steps to count, after 4 that are not; default 9")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows as JSON lines")
    parser.add_argument("--resume", action="store_true", help="leave out what --json holds from this machine")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw all rows of --json; needs matplotlib")
    args = parser.parse_args()
    if args.steps < 2 or ((args.resume or args.picture) and not args.json):
        parser.error("--steps must be >= 2; --resume and --picture need --json")
    hosts = [] if args.no_host else args.host or list(HOSTS)
    if not is_optimum_quanto_available():
        notice("QuantizedCache: optimum-quanto is not installed, left out")
        hosts = [host for host in hosts if not host.startswith("QuantizedCache")]
    own = [w and f", {w}{WEIGHTS}" for w in args.weights or [""]]
    args.contender = [*hosts, *(recipe + w for w in own for recipe in args.recipe or RECIPES)]
    args.batch = args.batch or [1, 4, 8, 16]
    args.context = args.context or [1024, 2048, 4096, 8192]
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    machine = {"cpu": cpu_name(), "threads": args.threads, "date": today(), "torch": torch.__version__,
               "steno": steno.__version__, "model": args.model}  # fmt: skip
    print(f"{machine['cpu']}, {args.threads} thread(s), {machine['date']}, torch {torch.__version__}, {args.model}; "
          f"medians of {args.steps} steps")  # fmt: skip
    finished = [row for row in read_rows(args.json) if "median_s" in row] if args.resume else []
    done = {tuple(row[field] for field in KEY) for row in latest(finished, KEY)}
    for row in bench(Models(args.model), args, done, machine):
        print_row(row)
        append_row(args.json, row)
    if args.picture:
        from benchmarks.pictures import draw_decode

        draw_decode(read_rows(args.json), args.picture)


if __name__ == "__main__":
    main()
