"""Read a document into a compressed cache and answer a question about it.

Without --document or --context it reads a part of the Python language reference. The answer streams to standard output; then a
table says what the memory cost. `--recipe full` keeps everything; `steno methods` lists what recipes are made of.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steno.cli.document import language_reference, read_document
from steno.cli.places import add_place, open_place
from steno.errors import BadArgument
from steno.models.default import DEFAULT_MODEL

if TYPE_CHECKING:
    from torch import Tensor

    from steno.context import Context
    from steno.decode.sampler import Sampling
    from steno.session import LanguageModel

DEFAULT_RECIPE = "shorthand @ 43%"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", metavar="QUESTION", help="what to ask; compression has not seen it")
    parser.add_argument("--document", metavar="FILE", help="text file to read, - for standard input")
    parser.add_argument("--context", metavar="FILE", help="ask a context that `steno read` saved, instead of reading")
    parser.add_argument(
        "--model", metavar="M", default=DEFAULT_MODEL,
        help="embedded model, Hugging Face id, local folder or GGUF file (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--recipe", metavar="R", help=f"what to keep (default: {DEFAULT_RECIPE!r})".replace("%", "%%"))
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=128, help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--compare", action="store_true", help="answer once more with the full cache, and compare")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text and table")
    sampling = parser.add_argument_group("sampling (default: greedy)")
    sampling.add_argument("--temperature", metavar="T", type=float, default=0.0)
    sampling.add_argument("--top-k", metavar="K", type=int)
    sampling.add_argument("--top-p", metavar="P", type=float)
    sampling.add_argument("--min-p", metavar="P", type=float)
    sampling.add_argument("--repetition-penalty", metavar="X", type=float, default=1.0)
    sampling.add_argument("--seed", metavar="S", type=int, default=0)
    sampling.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end the answer here; repeatable")
    add_place(parser)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype", metavar="D", help="compute in float32, bfloat16 or float16 (default: the machine's best)"
    )
    machine.add_argument(
        "--weights",
        metavar="W",
        help="keep the linear layers in bf16, fp16, int8 or int4: faster steps on an x86 CPU (default: as --dtype)",
    )
    machine.add_argument(
        "--chunk-tokens",
        metavar="N",
        type=int,
        help="read so many tokens at a time; streaming_llm, keydiff, locret and trim_kv then evict after each chunk",
    )
    machine.add_argument("--device", metavar="D", help="cpu or cuda (default: cuda where there is one)")


@dataclass(kw_only=True)
class Answer:
    """An answer and what it took."""

    text: str = ""
    token_ids: list[int]
    first_logprobs: Tensor | None = None  # [V]
    ttft_s: float = 0.0
    decode_tok_per_s: float | None = None


def run(arguments: argparse.Namespace) -> int:
    from steno.decode.sampler import Sampling
    from steno.recipe import parse_recipe
    from steno.session import load

    for name in ("document", "recipe", "compare"):
        if arguments.context and getattr(arguments, name):
            raise BadArgument(f"--context brings its own document and recipe; leave --{name} out.")
    recipe = parse_recipe(arguments.recipe or DEFAULT_RECIPE)  # a typing mistake is told before anything is loaded
    if arguments.max_new_tokens < 1:
        raise BadArgument(f"--max-new-tokens must be >= 1; got {arguments.max_new_tokens}.")
    if not arguments.question.strip():
        raise BadArgument("the question is empty.")
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    document = read_document(arguments.document) if arguments.document else None
    store = open_place(arguments)
    lm = load(arguments.model, store=store, dtype=arguments.dtype, device=arguments.device, weights=arguments.weights)
    if document is None and not arguments.context:
        document, what = language_reference(lambda text: len(lm.tokenize(text)))
        print(f"reading {what}", file=sys.stderr)
    context, answer = _read_and_ask(lm, document, str(recipe), arguments, sampling, stream=not arguments.json)
    result = _result(context, answer)
    if arguments.compare:
        if not arguments.json:
            print("\nwith the full cache:")
        full_context, full = _read_and_ask(lm, document, "full", arguments, sampling, stream=not arguments.json)
        result |= _comparison(answer, full, full_context)
    if arguments.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0


def _read_and_ask(
    lm: LanguageModel,
    document: str | None,
    recipe: str,
    arguments: argparse.Namespace,
    sampling: Sampling,
    *,
    stream: bool,
) -> tuple[Context, Answer]:
    from steno.cli.show import progress_bar

    if document is None:
        context = lm.open(arguments.context)
    else:
        with progress_bar() as progress:
            context = lm.read(
                document,
                recipe,
                reserve_tokens=arguments.max_new_tokens,
                chunk_tokens=arguments.chunk_tokens,
                progress=progress,
            )
    if context.note:
        print(f"steno: {context.note}", file=sys.stderr)
    started = time.perf_counter()
    answer, last = Answer(token_ids=[]), started
    steps = context.ask(
        arguments.question,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop=arguments.stop,
        keep_logprobs=arguments.compare,
    )
    for step in steps:
        now = time.perf_counter()
        if not answer.token_ids:
            answer.ttft_s = now - started
            answer.first_logprobs = step.logprobs[0] if step.logprobs is not None else None
        if step.token_ids:
            last = now
        answer.token_ids += step.token_ids
        answer.text += step.text
        if stream:
            print(step.text, end="", flush=True)
    if stream:
        print()
    later = last - started - answer.ttft_s
    if len(answer.token_ids) > 1 and later > 0:
        answer.decode_tok_per_s = (len(answer.token_ids) - 1) / later
    return context, answer


def _result(context: Context, answer: Answer) -> dict[str, Any]:
    report = context.report()
    return {
        "answer": answer.text,
        "model": report.model,
        "dtype": report.dtype,
        "weights": context.lm.loaded.weights,
        "recipe": report.recipe,
        "prompt_tokens": report.prompt_tokens,
        "new_tokens": len(answer.token_ids),
        "kv_bytes_full": report.kv_bytes_full,
        "kv_bytes": report.kv_bytes,
        "kv_bytes_peak": report.kv_bytes_peak,
        "stored_tokens": report.stored_tokens,
        "prefill_s": report.prefill_s,
        "compress_s": report.compress_s,
        "ttft_s": answer.ttft_s,
        "decode_tok_per_s": answer.decode_tok_per_s,
    }


def _comparison(answer: Answer, full: Answer, full_context: Context) -> dict[str, Any]:
    """KL divergence of the first answer token, full against compressed, in nats; share of equal tokens by position."""
    kl = None
    if full.first_logprobs is not None and answer.first_logprobs is not None:
        p, q = full.first_logprobs.double(), answer.first_logprobs.double()
        kl = float((p.exp() * (p - q)).sum().clamp_min(0))
    longest = max(len(answer.token_ids), len(full.token_ids))
    equal = sum(a == b for a, b in zip(answer.token_ids, full.token_ids, strict=False))
    return {
        "full_answer": full.text,
        "full_new_tokens": len(full.token_ids),
        "full_prefill_s": full_context.prefill_s,
        "full_decode_tok_per_s": full.decode_tok_per_s,
        "kl_first_token": kl,
        "equal_tokens_share": equal / longest if longest else 1.0,
    }


def _print_table(result: dict[str, Any]) -> None:
    from steno.cli.show import megabytes, print_table

    ratio = result["kv_bytes_full"] / result["kv_bytes"]
    speed = result["decode_tok_per_s"]
    rows: list[tuple[str, ...]] = [
        ("model", result["model"]),
        ("recipe", result["recipe"]),
        ("prompt tokens", f"{result['prompt_tokens']:,}"),
        ("new tokens", f"{result['new_tokens']:,}"),
        (f"memory, full cache in {result['dtype']}", megabytes(result["kv_bytes_full"])),
        ("memory held", f"{megabytes(result['kv_bytes'])} ({ratio:.1f} times smaller)"),
        ("memory, peak", megabytes(result["kv_bytes_peak"])),
        *([("from the store", f"{result['stored_tokens']:,} tokens")] if result["stored_tokens"] else []),
        ("prefill", f"{result['prefill_s']:.2f} s"),
        ("scoring and packing after it", f"{result['compress_s']:.2f} s"),
        ("time to first token", f"{result['ttft_s']:.2f} s"),
        ("decode", "-" if speed is None else f"{speed:.1f} tokens/s"),
    ]
    if "kl_first_token" in result:
        full_speed = result["full_decode_tok_per_s"]
        rows += [
            ("full cache: prefill", f"{result['full_prefill_s']:.2f} s"),
            ("full cache: decode", "-" if full_speed is None else f"{full_speed:.1f} tokens/s"),
            ("KL of the first token", f"{result['kl_first_token']:.4f} nats"),
            ("equal tokens", f"{100 * result['equal_tokens_share']:.0f} %"),
        ]
    print()
    print_table(rows)
