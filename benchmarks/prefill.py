"""What compression adds to a prefill: each recipe against DynamicCache with SDPA and against the recipe `full`.

A repeat runs every contender once, in turn, on the same tokens; an overhead is the median over the repeats of the ratio
to the baseline of the same repeat. For machines that do other things too there are CPU seconds, of all threads, the
fastest run of a recipe against the fastest of `full`, and `--layers`. Methods that replay the context are timed with
their replay. `--json` adds the rows to a file and replaces older ones of the same recipe and length, so that recipes can
be measured one at a time; `--draw` turns such a file into a picture (needs matplotlib: pip install "stenokv[bench]").
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

HERE = Path(__file__).resolve().parent
# transformers looks for a package `kernels` and must not find this folder's kernels.py
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

import torch
from benchmarks.common import cpu_name
from benchmarks.result_recipes import MIDDLE, entries
from transformers import DynamicCache

import steno
from steno.cache.layer import LayerCache
from steno.errors import StenoError
from steno.methods import KVzip
from steno.recipe import parse_recipe
from steno.replay import replay_context
from steno.types import Need

HOST = "DynamicCache"
BASELINES = (HOST, "full")
WARM_UP_TOKENS = 512


def default_recipes() -> list[str]:
    """What docs/results.md measures of every method, at its middle budget; of methods that replay, one."""
    recipes = [
        entry.text for entry in entries()[0] if not (entry.is_peer or entry.of_bytes) and entry.budget in (None, MIDDLE)
    ]
    replays = [recipe for recipe in recipes if Need.REPLAY in parse_recipe(recipe).needs]
    return [recipe for recipe in recipes if recipe not in replays[1:]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Seconds of one prefill, of all its threads' work, and in `LayerCache.compress`; a replay counts as prefill."""

    prefill_s: float
    cpu_s: float
    compress_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe at one length; overheads in percent of the baseline of the same repeat."""

    recipe: str
    tokens: int
    repeats: int
    replays: bool
    prefill_s: float
    prefill_s_quartiles: tuple[float, float]
    full_s: float
    host_s: float
    cpu_s: float
    compress_s: float
    fastest_s: float
    overhead_full_cpu_percent: float
    overhead_full_fastest_percent: float
    overhead_full_percent: float
    overhead_full_percent_quartiles: tuple[float, float]
    overhead_host_percent: float
    overhead_host_percent_quartiles: tuple[float, float]


class Contest:
    """One model and one prompt, which every contender reads."""

    def __init__(self, lm: steno.LanguageModel, num_tokens: int) -> None:
        self.lm = lm
        text = "\n\n".join(topics[name] for name in sorted(topics))
        self.tokens = lm.tokenize(lm.template.before + text)[:num_tokens]
        if len(self.tokens) < num_tokens:
            raise SystemExit(f"the text has {len(self.tokens)} tokens, fewer than the {num_tokens} asked for")
        self.num_prefix = len(lm.tokenize(lm.template.before))
        self.inputs = torch.tensor([self.tokens])

    def run(self, name: str) -> Run:
        """One prefill by a contender, a recipe or `DynamicCache`."""
        if name == HOST:
            self.lm.model.set_attn_implementation("sdpa")
            cache = DynamicCache(config=self.lm.model.config)
            return timed(lambda: self._forward(cache), [])
        self.lm.model.set_attn_implementation("steno")
        recipe = parse_recipe(name)
        cache = steno.KVCache(
            self.lm.model.config,
            recipe,
            prompt_tokens=len(self.tokens),
            model_hash=self.lm.loaded.model_hash,
            sentence_ends=self.lm.sentence_ends,
        )
        clocks = [CompressClock(layer) for layer in cache.own_layers]

        def prefill() -> None:
            with cache.watching(self.lm.model):
                cache.announce([self.tokens])
                self._forward(cache)
            if isinstance(recipe.score, KVzip):
                self._replay(cache, recipe.score)

        return timed(prefill, clocks)

    def _forward(self, cache: Any) -> None:
        with torch.inference_mode():
            self.lm.model(self.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _replay(self, cache: steno.KVCache, method: KVzip) -> None:
        masses = replay_context(
            self.lm.model,
            cache,
            self.tokens,
            num_prefix_tokens=self.num_prefix,
            method=method,
            tokenizer=self.lm.tokenizer,
            after=self.lm.template.after,
            max_positions=self.lm.loaded.max_positions,
        )
        cache.compress(masses)


def timed(prefill: Callable[[], None], clocks: list[CompressClock]) -> Run:
    started, cpu_started = time.perf_counter(), time.process_time()
    prefill()
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return Run(prefill_s=wall, cpu_s=cpu, compress_s=sum(clock.seconds for clock in clocks))


class CompressClock:
    """Adds up the seconds that one layer spends in `compress`."""

    def __init__(self, layer: LayerCache) -> None:
        self.seconds = 0.0
        self._compress = layer.compress
        layer.compress = self

    def __call__(self, replay_mass: torch.Tensor | None) -> None:
        started = time.perf_counter()
        self._compress(replay_mass)
        self.seconds += time.perf_counter() - started


def measure(contest: Contest, recipes: list[str], repeats: int) -> Iterable[Row]:
    """Rows of all recipes at one length."""
    contenders = [*BASELINES, *(r for r in recipes if r not in BASELINES)]
    refused: list[str] = []
    warm_up = Contest(contest.lm, min(WARM_UP_TOKENS, len(contest.tokens)))
    for i, name in enumerate(contenders):
        progress(f"warming up, {i + 1} of {len(contenders)}: {name}")
        try:
            warm_up.run(name)
        except StenoError as error:
            print(f"\n{name}: left out: {error}", file=sys.stderr)
            refused.append(name)
    contenders = [name for name in contenders if name not in refused]
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    with suppress(KeyboardInterrupt):  # what was measured by then still counts
        for repeat in range(repeats):
            for name in contenders:
                progress(f"{len(contest.tokens)} tokens, repeat {repeat + 1} of {repeats}: {name}")
                runs[name].append(contest.run(name))
    progress("")
    complete = min(len(x) for x in runs.values())
    runs = {name: x[:complete] for name, x in runs.items()}
    for name in contenders[1:] if complete else ():
        yield as_row(name, len(contest.tokens), runs)


def progress(line: str) -> None:
    print(f"\r{line:100}\r", end="", file=sys.stderr, flush=True)


def as_row(name: str, num_tokens: int, runs: dict[str, list[Run]]) -> Row:
    seconds = {n: [run.prefill_s for run in runs[n]] for n in (name, *BASELINES)}
    over = {n: [100 * (a / b - 1) for a, b in zip(seconds[name], seconds[n], strict=True)] for n in BASELINES}
    cpu_over = [100 * (a.cpu_s / b.cpu_s - 1) for a, b in zip(runs[name], runs["full"], strict=True)]
    return Row(
        recipe=name,
        tokens=num_tokens,
        repeats=len(runs[name]),
        replays=name != HOST and Need.REPLAY in parse_recipe(name).needs,
        prefill_s=statistics.median(seconds[name]),
        prefill_s_quartiles=quartiles(seconds[name]),
        full_s=statistics.median(seconds["full"]),
        host_s=statistics.median(seconds[HOST]),
        cpu_s=statistics.median(run.cpu_s for run in runs[name]),
        compress_s=statistics.median(run.compress_s for run in runs[name]),
        fastest_s=min(seconds[name]),
        overhead_full_fastest_percent=100 * (min(seconds[name]) / min(seconds["full"]) - 1),
        overhead_full_cpu_percent=statistics.median(cpu_over),
        overhead_full_percent=statistics.median(over["full"]),
        overhead_full_percent_quartiles=quartiles(over["full"]),
        overhead_host_percent=statistics.median(over[HOST]),
        overhead_host_percent_quartiles=quartiles(over[HOST]),
    )


def keep_layers(lm: steno.LanguageModel, num_layers: int) -> None:
    """Cuts the model down to its first layers: each adds the same share, and runs become short."""
    config = lm.model.config
    lm.model.model.layers = lm.model.model.layers[:num_layers]
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def show(row: Row) -> str:
    low, high = row.overhead_full_percent_quartiles
    return (
        f"  {row.recipe:36} {row.prefill_s:7.2f} s, compress {row.compress_s:6.3f} s   "
        f"against full {row.overhead_full_percent:+6.1f} % [{low:+.1f}, {high:+.1f}], "
        f"CPU {row.overhead_full_cpu_percent:+6.1f} %, fastest {row.overhead_full_fastest_percent:+6.1f} %   "
        f"against {HOST} {row.overhead_host_percent:+6.1f} %"
    )


def merge_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows to a file, in place of older ones of the same recipe, length and processor."""
    key = lambda row: tuple(row[name] for name in ("cpu", "threads", "layers", "tokens", "recipe"))  # noqa: E731
    merged = {key(row): row for row in read_rows(path)} if path.exists() else {}
    merged.update({key(row): row for row in rows})
    path.write_text("".join(json.dumps(row) + "\n" for row in merged.values()), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Overheads against the plain prefill, one bar per recipe and length; replays are left to the table."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "prefill"  # the same rows give the same file
    from matplotlib import pyplot

    rows = [row for row in rows if not row["replays"] and row["recipe"] != "full"]
    lengths = sorted({row["tokens"] for row in rows})
    longest = {row["recipe"]: row["overhead_full_percent"] for row in rows if row["tokens"] == lengths[-1]}
    recipes = sorted(longest, key=lambda recipe: longest[recipe])
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.42 * len(recipes)), layout="constrained")
    height = 0.8 / len(lengths)
    for i, length in enumerate(lengths):
        found = {row["recipe"]: row for row in rows if row["tokens"] == length}
        at = [n for n, recipe in enumerate(recipes) if recipe in found]
        medians = [found[recipes[n]]["overhead_full_percent"] for n in at]
        bounds = [found[recipes[n]]["overhead_full_percent_quartiles"] for n in at]
        errors = [[max(0.0, m - low) for m, (low, _) in zip(medians, bounds, strict=True)],
                  [max(0.0, high - m) for m, (_, high) in zip(medians, bounds, strict=True)]]  # fmt: skip
        places = [n + (i - (len(lengths) - 1) / 2) * height for n in at]
        axes.barh(places, medians, height * 0.9, xerr=errors, label=f"{length:,} tokens", error_kw={"linewidth": 0.8})
    axes.axvline(15, color="black", linewidth=0.8, linestyle="--")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(recipes)), recipes)
    axes.set_xlabel("seconds added to a plain prefill, % (median and quartiles)")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", action="append", help="repeatable; default: every method, and some combinations")
    parser.add_argument("--tokens", action="append", type=int, help="repeatable; default: 1024, 2048 and 4096")
    parser.add_argument("--layers", type=int, help="only the first layers of the model, for shorter runs; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="after a warm-up on fewer tokens")
    parser.add_argument("--json", metavar="FILE", type=Path, help="add the rows to a file of JSON lines")
    parser.add_argument("--draw", metavar="FIGURE", type=Path, help="measure nothing: draw the rows of --json")
    arguments = parser.parse_args()
    if arguments.draw:
        if not arguments.json:
            parser.error("--draw needs --json FILE, the rows to draw")
        draw(read_rows(arguments.json), arguments.draw)
        return
    lm = steno.load(arguments.model)
    if arguments.layers:
        keep_layers(lm, arguments.layers)
    common = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "date": str(date.today()),
        "model": lm.name,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "layers": lm.model.config.num_hidden_layers,
    }
    print(f"{', '.join(f'{name} {value}' for name, value in common.items())}, medians of {arguments.repeats}")
    for num_tokens in arguments.tokens or (1024, 2048, 4096):
        rows = []
        print(f"\nprefill of {num_tokens} tokens")
        for row in measure(Contest(lm, num_tokens), arguments.recipe or default_recipes(), arguments.repeats):
            print(show(row), flush=True)
            rows.append(common | asdict(row))
        if arguments.json:
            merge_rows(arguments.json, rows)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
