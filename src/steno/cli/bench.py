"""Measure recipes on a model: what each costs in bytes and seconds, and what it loses.

For each recipe, task and length one row goes to OUT/rows.jsonl as soon as it is measured; then OUT/report.md and
OUT/report.html say which recipe to take. The question is not seen by compression unless --protocol says so.

tasks: niah (depth by length), perplexity, questions, long_generation, stress, RULER's niah_single_1..3, niah_multikey_1..3,
niah_multivalue, niah_multiquery, vt, cwe, fwe; groups: ruler, all; your own: jsonl:FILE with lines
{"context", "question", "answers"}, longbench:FILE, perplexity:FILE (text), qa_1:FILE and qa_2:FILE (SQuAD format).

peers, other projects' caches on the same instances (`make peers` in a checkout installs them): transformers:dynamic,
transformers:quanto4, quanto2, hqq4, hqq2; kvpress:METHOD@SHARE, e.g. kvpress:snapkv@25%.
"""

from __future__ import annotations

import argparse

DEFAULT_RECIPES = (
    "full",
    "kivi(bits=4)",
    "kvzip | adakv @ 50%",
    "shorthand @ 43%",
    "snapkv @ 50%",
)
DEFAULT_TASK, DEFAULT_CONTEXT, DEFAULT_SAMPLES = "niah", 2048, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="as for `steno ask` (default: smollm2-135m)")
    parser.add_argument("--recipe", metavar="R", action="append", help="repeatable (default: a choice of five)")
    parser.add_argument(
        "--peer",
        metavar="P",
        action="append",
        help="another project's cache, NAME:METHOD or NAME:METHOD@SHARE; repeatable",
    )
    parser.add_argument("--task", metavar="T", action="append", help=f"repeatable (default: {DEFAULT_TASK})")
    parser.add_argument(
        "--context", metavar="N", type=int, action="append",
        help=f"length in the model's tokens, question and answer included; repeatable (default: {DEFAULT_CONTEXT})",
    )  # fmt: skip
    parser.add_argument(
        "--protocol", choices=("unseen", "seen"), action="append",
        help="whether compression sees the question; repeatable (default: unseen)",
    )  # fmt: skip
    parser.add_argument("--samples", metavar="N", type=int, help=f"instances of each task (default: {DEFAULT_SAMPLES})")
    parser.add_argument("--seed", metavar="S", type=int, help="of the instances (default: 0)")
    parser.add_argument(
        "--out", metavar="DIR", default="steno-bench", help="folder of rows and report (default: %(default)s)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the rows of --out; what is finished is skipped"
    )
    parser.add_argument(
        "--against", metavar="FILE",
        help="rows of an earlier run: print what became better or worse beyond the intervals, status 1 if worse; without "
        "--recipe, --task and --context it measures what FILE has",
    )  # fmt: skip
    parser.add_argument(
        "--ray", metavar="ADDRESS", nargs="?", const="auto",
        help="measure on a Ray cluster that is there, e.g. `ray start --head` (default address: auto)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--dtype", metavar="D", help="as for `steno ask`")
    machine.add_argument("--device", metavar="D", help="cpu or cuda (default: cuda where there is one)")


def run(arguments: argparse.Namespace) -> int:
    from steno.cli.benching import run_bench  # what it needs takes seconds to import, which --help shall not wait for

    return run_bench(arguments)
