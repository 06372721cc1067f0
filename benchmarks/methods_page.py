"""Write the measured part of docs/methods.md from benchmarks/results/bench-*.jsonl, the rows of docs/results.md, and
prefill-*.jsonl, those of `benchmarks/prefill.py`.

One line for each method and form that is measured; of rows that measure the same thing the last one counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# as in the other scripts: nothing in this folder is to pass for an installed package
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

from benchmarks.common import notice
from benchmarks.common import read_rows as read_json
from benchmarks.report import replaced
from benchmarks.result_recipes import AT_ALL_BUDGETS, BUDGETS, CONTEXTS, NEEDLES, TEXT, Entry, entries
from benchmarks.result_summary import DASH, latest, table

from steno.bench.rows import Row, read_rows
from steno.methods import describe_methods

PART = "measured"
NUM_LAYERS = 30
"""Of the model that is measured."""

HEAD = (
    "kind", "name", "recipe", "paper", "sees", "trained", *BUDGETS, "without a budget", "compression, s", "prefill",
)  # fmt: skip
Found = dict[tuple[str, str, int], Row]


def page(rows: Sequence[Row], prefills: Sequence[dict[str, Any]]) -> str:
    """The text of the part: what was measured on what, and a line for each method and form."""
    known, left_out = entries()
    found, by_form = latest(rows), {row["recipe"].split(" @ ")[0]: row for row in prefills}
    lines = [line for method in describe_methods() for line in method_lines(method, known, found, by_form)]
    blocks = [*(conditions(rows, known, found) if rows else ["No rows are measured yet."]), table(HEAD, lines)]
    if left_out:
        blocks.append("Not measured: " + "; ".join(f"`{name}`, {why}" for name, why in left_out.items()) + ".")
    return "\n\n".join(blocks)


def conditions(rows: Sequence[Row], known: Sequence[Entry], found: Found) -> Iterator[str]:
    """What a cell says, and where its numbers come from."""
    first, longest = rows[0], max(CONTEXTS)
    places = [(entry.text, task, longest) for entry in known if not entry.is_peer for task in AT_ALL_BUDGETS]
    timed = [row for place in places if (row := found.get(place)) is not None]
    hosts = ", ".join(dict.fromkeys(f"{row.host}, {row.threads} thread(s)" for row in timed))
    needles = " and ".join(f"`{task}`" for task in AT_ALL_BUDGETS if task in NEEDLES)
    contexts = " and ".join(f"{context:,}" for context in CONTEXTS)
    yield (
        f"{first.model} in {first.dtype} on {first.device}. In a cell, above: the share of right answers on {needles} "
        f"at {contexts} tokens, the KL divergence in nats a token and the top-1 agreement on text that goes on, both against "
        "the full cache; below: bits held per number of the full cache, the share of its bytes, and milliseconds of a decode "
        f"step. Bytes and milliseconds are those at the greatest length, the latter on {hosts}, beside other work: smaller "
        "differences are none. A budget is a share of the tokens, or of the bytes where it says "
        f"so; `{DASH}`: not measured, or refused. Intervals and single tasks: [results.md](results.md)."
    )
    yield (
        "*Compression*: seconds that scoring, choosing and packing a prompt of 4,096 tokens took, of all layers (measured over "
        "four of them where they are alike), and *prefill*: how much longer the whole prefill took than that of `full`, from "
        "`benchmarks/prefill.py` on two threads; [performance.md](performance.md) has the spread. `kvzip` spends its time on "
        "replaying the prompt."
    )


def method_lines(
    method: dict[str, object], known: Sequence[Entry], found: Found, by_form: Mapping[str, dict[str, Any]]
) -> Iterator[list[str]]:
    """The lines of a method, as `describe_methods` has it: one for each form, or one of dashes."""
    mine = [entry for entry in known if entry.shows == (method["kind"], method["id"])]
    needs = method["needs"]
    assert isinstance(needs, list)
    paper = f"[{method['arxiv']}](https://arxiv.org/abs/{method['arxiv']}), " if method["arxiv"] else ""
    about = [
        f"{paper}{method['year']}",
        ", ".join(need.lower().replace("_", " ") for need in needs) or "keys and values",
        "yes" if method["trained"] else "no",
    ]
    name = [str(method["kind"]), f"`{method['id']}`"]
    if not mine:
        yield [*name, DASH, *about, *[DASH] * (len(BUDGETS) + 3)]
    for form, entries_of in groupby(mine, key=lambda entry: entry.form):
        group = list(entries_of)
        cells = {entry.budget: cell(entry, found) for entry in group}
        measured = [cells.get(budget, DASH) for budget in (*BUDGETS, None)]
        text = f"`{form}`" + (", of bytes" if any(entry.of_bytes for entry in group) else "")
        yield [*name, text, *about, *measured, *prefill_cells(by_form.get(form))]


def prefill_cells(row: Mapping[str, Any] | None) -> list[str]:
    """Seconds of compression over all layers, and by how much the prefill is longer."""
    if row is None:
        return [DASH, DASH]
    return [f"{row['compress_s'] * NUM_LAYERS / row['layers']:.2f}", f"{row['overhead_full_percent']:+.0f} %"]


def cell(entry: Entry, found: Found) -> str:
    """What is known of a recipe at one budget."""
    rows = [row for c in CONTEXTS for task in AT_ALL_BUDGETS if (row := found.get((entry.text, task, c))) is not None]
    if not rows:
        return DASH
    scores = [score for row in rows if row.task in NEEDLES for score in row.scores]
    texts = [row for row in rows if row.task in TEXT]
    longest = [row for row in rows if row.context_tokens == max(row.context_tokens for row in rows)]
    steps = [row.decode_ms_per_token for row in longest if row.decode_ms_per_token is not None]
    top1 = [row.top1_agreement for row in texts if row.top1_agreement is not None]
    share = sum(row.kv_bytes for row in longest) / sum(row.kv_bytes_full for row in longest)
    quality = [
        f"{mean(scores):.2f}" if scores else DASH,
        f"KL {mean(kls):.3f}" if (kls := [row.kl for row in texts if row.kl is not None]) else f"KL {DASH}",
        f"{mean(top1):.0%}" if top1 else DASH,
    ]
    held = [f"{mean([row.bits_per_value for row in longest]):.2f} bits", f"{share:.0%}"]
    held.append(f"{mean(steps):.0f} ms" if steps else DASH)
    return "<br>".join(", ".join(line) for line in (quality, held))


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument("--document", type=Path, default=HERE.parent / "docs" / "methods.md", metavar="FILE")
    args = parser.parse_args()
    rows = [row for path in sorted(args.results.glob("bench-*.jsonl")) for row in read_rows(path)]
    prefills = [row for path in sorted(args.results.glob("prefill-*.jsonl")) for row in read_json(path)]
    text = replaced(args.document.read_text(encoding="utf-8"), PART, page(rows, prefills))
    if text is None:
        notice(f"{args.document} has no <!-- {PART} --> … <!-- /{PART} -->")
        sys.exit(1)
    args.document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
