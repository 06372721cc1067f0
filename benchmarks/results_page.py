"""Write docs/results.md and its figures from benchmarks/results/bench-*.jsonl; the same rows give the same page.

Of rows that measure the same thing the last one counts. Times in the rows are not shown: they may come from a busy machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
# as in the other scripts: nothing in this folder is to pass for an installed package
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

from benchmarks.common import notice
from benchmarks.result_figures import draw_budgets, draw_recipes
from benchmarks.result_recipes import AT_ALL_BUDGETS, BUDGETS, CONTEXTS, MIDDLE, NEEDLES, TASKS, Entry, entries, wanted
from benchmarks.result_summary import DASH, Summary, latest, pooled, table

from steno.bench.rows import Row, read_rows

COLUMNS = (
    "recipe", "score (95 %)", "full", "difference (95 %)", "instances", "KL on text", "top-1", "held MB",
    "of full", "peak of full",
)  # fmt: skip
LIMITS = """## What these numbers do not show

- One model, SmolLM2-135M: small, three KV heads, 30 layers. A larger model has more to spare, and the order of methods may
  differ there.
- Short contexts, 512 and 1,024 tokens, and few instances. The intervals say how little a single difference means; recipes
  whose intervals overlap are not told apart. They are over the instances drawn, not over tasks, models or languages.
- Needles and numbers in prose, and running text. Nothing here asks for reasoning, summaries, code or many turns.
- Compression does not see the question. Methods that look at the last queries of the prompt (SnapKV, TOVA, PyramidKV) were
  made for prompts that end in their question (`steno bench --protocol seen`).
- No time. These rows were measured beside other work; for speed see [performance.md](performance.md).
- CPU alone.
- Every method stands with its defaults, not tuned to this model, peers too, at their pinned versions.
"""


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def title(entry: Entry) -> str:
    return f"`{entry.text}`" + (" (peer)" if entry.is_peer else "")


def cells(summary: Summary) -> list[str]:
    score, difference = summary.score, summary.difference
    is_full = summary.name == "full"
    return [
        title(summary.entry),
        f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})",
        f"{summary.full:.2f}",
        DASH if is_full else f"{signed(difference.value)} ({signed(difference.low)} to {signed(difference.high)})",
        str(summary.instances),
        DASH if summary.kl is None or is_full else f"{summary.kl:.3f}",
        DASH if summary.top1 is None or is_full else f"{summary.top1:.0%}",
        f"{summary.kv_bytes / 1e6:.2f}",
        f"{summary.share:.0%}",
        f"{summary.peak_share:.0%}",
    ]


def by_length(
    found: dict[tuple[str, str, int], Row], known: Sequence[Entry], link: str, figures: Path
) -> Iterator[str]:
    """A table and a figure for each length, at the middle budget."""
    for context in CONTEXTS:
        tasks = [task for task in TASKS if any((e.text, task, context) in found for e in known)]
        if not any(task in NEEDLES for task in tasks):
            continue
        middle = [entry for entry in known if entry.budget in (None, MIDDLE) and not entry.of_bytes]
        every = [s for entry in middle if (s := pooled(found, entry, tasks, context)) is not None]
        if not every:
            continue
        every.sort(key=lambda s: (-s.score.value, s.kv_bytes))
        yield f"## {context:,} tokens, budgets of {MIDDLE}"
        yield f"Score: the mean over the instances of {', '.join(f'`{t}`' for t in tasks if t in NEEDLES)}."
        draw_recipes(every, figures / f"results-{context}.svg")
        yield f"![Scores and memory at {context} tokens]({link}/results-{context}.svg)"
        yield table(COLUMNS, [cells(summary) for summary in every])


def by_budget(
    found: dict[tuple[str, str, int], Row], known: Sequence[Entry], link: str, figures: Path
) -> Iterator[str]:
    """Score of each method at each budget, all lengths together: shares of the tokens, then of the bytes."""
    needles = " and ".join(f"`{task}`" for task in AT_ALL_BUDGETS if task in NEEDLES)
    heads = {
        False: ("Three budgets", "A budget is a share of the tokens."),
        True: (
            "Three budgets in bytes",
            "A budget is a share of the bytes of the full cache, of which a method holds as many tokens as fit, all where "
            "they do; bases and indexes count, and with few tokens they leave little, or no, room for them.",
        ),
    }
    for of_bytes, (head, about) in heads.items():
        points = [
            (entry, context, summary)
            for context in CONTEXTS
            for entry in known
            if entry.budget is not None and entry.of_bytes == of_bytes
            if (summary := pooled(found, entry, AT_ALL_BUDGETS, context)) is not None
        ]
        if not points:
            continue
        yield f"## {head}"
        yield f"{about} Score and interval on {needles}, and KL; `{DASH}`: not measured, or refused."
        name = f"results-budgets{'-bytes' if of_bytes else ''}.svg"
        draw_budgets(points, figures / name)
        yield f"![Scores at three budgets]({link}/{name})"
        places = {(e.form, context, e.budget): budget_cell(summary) for e, context, summary in points}
        cols = [(context, budget) for context in CONTEXTS for budget in BUDGETS]
        forms = dict.fromkeys(e.form for e, _, _ in points)
        lines = [[f"`{form}`", *(places.get((form, *col), DASH) for col in cols)] for form in forms]
        yield table(["method", *(f"{budget} of {context:,}" for context, budget in cols)], lines)


def budget_cell(summary: Summary) -> str:
    score = summary.score
    drift = "" if summary.kl is None else f"<br>KL {summary.kl:.3f}"
    return f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f}){drift}"


def by_task(found: dict[tuple[str, str, int], Row], known: Sequence[Entry]) -> Iterator[str]:
    """Score of each recipe on each task, middle budget."""
    cols = [(task, context) for context in CONTEXTS for task in TASKS]
    cols = [c for c in cols if any((e.text, *c) in found for e in known)]
    lines = []
    for entry in known:
        rows = [found.get((entry.text, *col)) for col in cols]
        if entry.budget in (None, MIDDLE) and any(rows):
            lines.append([title(entry), *(DASH if row is None else f"{row.score:.2f}" for row in rows)])
    yield "## Task by task"
    yield "Of `perplexity` the score is 1 / perplexity."
    yield table(["recipe", *(f"{task} {context}" for task, context in cols)], lines)


def measured(rows: Sequence[Row], known: Sequence[Entry], left_out: dict[str, str], num_all: int) -> Iterator[str]:
    """What was measured, on what, and what was not."""
    first = rows[0]
    hosts = ", ".join(dict.fromkeys(f"{row.host}, {row.threads} thread(s)" for row in rows))
    dates = sorted(row.measured_at[:10] for row in rows)
    versions = sorted(
        {f"{k.rpartition(': ')[2]} {v}" if ": " in k else f"{k} {v}" for r in rows for k, v in r.versions.items()}
    )
    commits = ", ".join(dict.fromkeys((row.git_sha or "unknown")[:12] for row in rows))
    samples = ", ".join(f"{task} {count}" for task, count in TASKS.items())
    yield (
        f"{first.model} ({first.model_hash}) computing in {first.dtype} on {first.device}; {hosts}; {dates[0]} to {dates[-1]}; "
        f"commit {commits}; {', '.join(versions)}."
    )
    yield (
        f"Instances at each length: {samples}. All recipes meet the same instances (seed {first.seed}), decode greedily and "
        "see the question only after compression; the difference is paired with the full cache. Intervals are at 95 %, "
        "Wilson or Newcombe where every score is 0 or 1, else bootstrap over the instances. KL (nats a token) and top-1 "
        "agreement: on 256 tokens of text that goes on, forced, against the full cache. Bytes are measured on the tensors "
        "held; peak is the most while reading and answering."
    )
    if (count := len(latest(rows))) < num_all:
        yield (
            f"{count} of at most {num_all} rows: the others were refused (a window longer than the budget, bases that take more "
            "than it), or failed (some peers'), or are not measured yet. `make results-rows` tells which, and measures these."
        )
    if left_out:
        yield "Methods that are not measured: " + "; ".join(f"`{name}`, {why}" for name, why in left_out.items()) + "."


def page(rows: Sequence[Row], link: str, figures: Path) -> str:
    known, left_out = entries()
    found = latest(rows)
    num_all = len(CONTEXTS) * sum(len(wanted(task)) for task in TASKS)
    blocks = [
        "# Results: what a recipe costs and what it loses",
        "Written by `make results` from `benchmarks/results/bench-*.jsonl`; `make results-rows` measures the rows, with the "
        "peers that `make peers` installed, and goes on where it stopped. One recipe for each method and budget "
        "(`benchmarks/result_recipes.py`), peers as in [peers.md](peers.md).",
        *measured(rows, known, left_out, num_all),
        LIMITS.strip(),
        *by_length(found, known, link, figures),
        *by_budget(found, known, link, figures),
        *by_task(found, known),
    ]
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    docs = HERE.parent / "docs"
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument("--document", type=Path, default=docs / "results.md", metavar="FILE")
    parser.add_argument("--figures", type=Path, default=docs / "figures", metavar="FOLDER")
    args = parser.parse_args()
    rows = [row for path in sorted(args.results.glob("bench-*.jsonl")) for row in read_rows(path)]
    if not rows:
        notice(f"no rows in {args.results}/bench-*.jsonl; measure them with `make results-rows`")
        sys.exit(1)
    link = Path(os.path.relpath(args.figures, args.document.resolve().parent)).as_posix()
    args.figures.mkdir(parents=True, exist_ok=True)
    args.document.write_text(page(rows, link, args.figures), encoding="utf-8")


if __name__ == "__main__":
    main()
