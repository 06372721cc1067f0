"""One planted number in a long text, asked for after compression: what a recipe costs and what it loses.

RULER's single-needle task (Hsieh et al. 2024, https://arxiv.org/abs/2404.06654, appendix B) with its wording and answer
prefix: a seven-digit number for a two-word key, in essay-like text (here the Python language reference, which every
machine has). The question is not seen by compression. Depths are spread evenly over the samples.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from datetime import date
from pathlib import Path
from pydoc_data.topics import topics

HERE = Path(__file__).resolve().parent
# transformers looks for a package `kernels` and must not find this folder's kernels.py
sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE]

import torch
from rich.progress import track

import steno

ADJECTIVES = [
    "brave",
    "calm",
    "clever",
    "eager",
    "fair",
    "gentle",
    "happy",
    "jolly",
    "kind",
    "lively",
    "mighty",
    "noble",
    "proud",
    "quick",
    "quiet",
    "rapid",
    "shy",
    "wise",
]
NOUNS = [
    "anchor",
    "bridge",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbor",
    "island",
    "jungle",
    "kettle",
    "ladder",
    "meadow",
    "needle",
    "orchard",
]
INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic number for {key} mentioned in the provided text is"
DEFAULT_RECIPES = [
    "full",
    "kvzip | adakv @ 50%",
    "kivi(bits=4)",
    "kvzip | adakv | kivi(bits=4) @ 50%",
    "snapkv @ 50%",
    "expected_attention @ 50%",
    "streaming_llm @ 50%",
]


def haystack(kind: str) -> str:
    if kind == "noise":
        return "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n" * 2000
    return "\n\n".join(topics[name] for name in sorted(topics))


def sample(
    lm: steno.LanguageModel, index: int, count: int, num_tokens: int, seed: int, kind: str
) -> tuple[str, str, str]:
    """Document of about `num_tokens` tokens with a needle at depth index / (count - 1), its key and its value."""
    rng = random.Random(f"{seed}-{index}")
    key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    value = str(rng.randint(10**6, 10**7 - 1))
    needle = NEEDLE.format(key=key, value=value)
    text = haystack(kind)
    start = rng.randrange(len(text) // 2)
    separator = "\n" if kind == "noise" else ". "
    start = text.index(separator, start) + len(separator)
    body = num_tokens - len(lm.tokenize(INTRODUCTION + needle)) - len(lm.tokenize(lm.template.before))
    sentences = text[start : start + 12 * num_tokens].split(separator)
    low, high = 1, len(sentences)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if len(lm.tokenize(separator.join(sentences[:middle]))) <= body else (low, middle - 1)
        )
    sentences = sentences[:low]
    sentences.insert(
        round(index / max(1, count - 1) * len(sentences)), needle.rstrip(".") if kind != "noise" else needle
    )
    return INTRODUCTION + separator.join(sentences), key, value


def run(lm: steno.LanguageModel, recipe: str, samples: list[tuple[str, str, str]]) -> dict[str, object]:
    right, prefill, compress, held, full, peak, first = [], 0.0, 0.0, 0, 0, 0, 0.0
    for document, key, value in track(
        samples, description=f"{recipe:40}", console=None, disable=not sys.stderr.isatty()
    ):
        context = lm.read(document, recipe)
        report = context.report()
        started = time.perf_counter()
        steps = context.ask(QUESTION.format(key=key), answer_prefix=ANSWER_PREFIX.format(key=key), max_new_tokens=16)
        answer = "".join(step.text for step in steps)
        first += time.perf_counter() - started
        right.append(value in answer)
        prefill, compress = prefill + report.prefill_s, compress + report.compress_s
        held, full, peak = held + report.kv_bytes, full + report.kv_bytes_full, max(peak, report.kv_bytes_peak)
    n = len(samples)
    return {
        "recipe": recipe,
        "right": sum(right),
        "samples": n,
        "missed": [i for i, ok in enumerate(right) if not ok],
        "prefill_s": prefill / n,
        "compress_s": compress / n,
        "kv_bytes": held // n,
        "kv_bytes_full": full // n,
        "kv_bytes_peak": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", action="append", help="repeatable; default: a choice of seven")
    parser.add_argument("--tokens", type=int, default=2000, help="length of the text in the model's tokens")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--haystack", choices=["prose", "noise"], default="prose")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per recipe")
    arguments = parser.parse_args()
    lm = steno.load(arguments.model)
    samples = [
        sample(lm, i, arguments.samples, arguments.tokens, arguments.seed, arguments.haystack)
        for i in range(arguments.samples)
    ]
    print(
        f"{arguments.samples} samples of {arguments.tokens} tokens of {arguments.haystack}, {lm.name} in {lm.model.dtype}, "
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, {date.today()}"
    )
    print(f"{'recipe':42} right   MB held  of full   peak MB  prefill s  compress s  total/prefill")
    for recipe in arguments.recipe or DEFAULT_RECIPES:
        row = run(lm, recipe, samples)
        print(
            f"{recipe:42} {row['right']:>2}/{row['samples']}  {row['kv_bytes'] / 1e6:8.2f} "
            f"{row['kv_bytes'] / row['kv_bytes_full']:7.1%} "
            f"{row['kv_bytes_peak'] / 1e6:9.2f} {row['prefill_s']:9.2f} {row['compress_s']:10.2f} "
            f"{1 + row['compress_s'] / row['prefill_s']:10.2f}",
            flush=True,
        )
        if arguments.json:
            with open(arguments.json, "a", encoding="utf-8") as file:
                file.write(
                    json.dumps(row | {"model": lm.name, "tokens": arguments.tokens, "seed": arguments.seed}) + "\n"
                )


if __name__ == "__main__":
    main()
