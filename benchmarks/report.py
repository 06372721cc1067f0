"""Write the measured parts of docs/performance.md from benchmarks/results/*.jsonl, and draw the pictures they show.

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`, NAME one of kernels, decode, prefill, peers; all other text stays
as it is. The rows of a part come from NAME*.jsonl; of rows that measure the same thing the last one counts. A part without
rows or without its markers is left as it is, with a notice. The same rows give the same text.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# as in the other scripts: nothing in this folder is to pass for an installed package
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

from benchmarks.common import Row, latest, notice, read_rows

DASH = "-"


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def where(rows: list[Row], *fields: str) -> str:
    """Machines, dates and whatever else all figures of a part stand for."""
    machines = dict.fromkeys(row.get("gpu") or row["cpu"] for row in rows)
    dates = sorted({row["date"] for row in rows})
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    rest = [f"{field} {', '.join(str(x) for x in found)}" for field in fields
            if (found := dict.fromkeys(row[field] for row in rows if row.get(field) is not None))]  # fmt: skip
    return f"Measured on {', '.join(machines)}, {', '.join([span, *rest])}."


def ms(row: Row) -> str:
    return f"{row['median_s'] * 1e3:.2f} [{row['low_s'] * 1e3:.2f}, {row['high_s'] * 1e3:.2f}]"


def optional(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)


def machine_of(row: Row) -> str:
    return str(row.get("gpu") or row["cpu"])


def kernels(rows: list[Row]) -> Iterator[str]:
    """One table for each machine and case; the contender that repeats keys is left out, it is never near the others."""
    rows = latest(rows, ("cpu", "gpu", "case", "rows", "tokens", "queries", "contender", "shared", "threads"))
    rows = [row for row in rows if "repeated" not in row["contender"]]
    if not rows:
        return
    yield (
        where(rows, "torch", "isa")
        + " Medians with quartiles; `of reads` is the share of the bandwidth of plain reads."
    )
    shape = lambda row: (machine_of(row), row["case"], row["rows"], row["tokens"])  # noqa: E731
    for (machine, case, batch, tokens), group in groupby(sorted(rows, key=shape), key=shape):
        found = list(group)
        title = f"**{case}**: {batch} x {tokens:,} tokens, {machine}"
        if case == "queries":
            yield f"{title}. Milliseconds (and how many times faster than SDPA bf16) for T new tokens a row."
            yield by_queries(found)
        else:
            yield f"{title}. {conditions(found)}"
            yield by_contender(found, case)


def conditions(rows: list[Row]) -> str:
    """How fast the machine read and computed meanwhile."""
    reads = ", ".join(
        f"{max(r['read_bytes_per_s'] for r in rows if r['threads'] == n) / 1e9:.1f} GB/s on {n} thread(s)"
        for n in sorted({row["threads"] for row in rows})
    )
    free = [row["compute_speedup"] for row in rows if row["compute_speedup"] is not None]
    note = f" A loop without memory ran {free[0]:.2f} times as fast on two threads meanwhile." if free else ""
    return f"Plain reads: {reads}.{note}"


def by_queries(rows: list[Row]) -> str:
    """Contenders against numbers of new tokens."""
    counts = sorted({row["queries"] for row in rows})
    cells = {(r["contender"], r["queries"]): f"{r['median_s'] * 1e3:.2f} ({r['speedup_fastest']:.2f})" for r in rows}
    names = dict.fromkeys(row["contender"] for row in rows)
    lines = [[name, *(cells.get((name, count), DASH) for count in counts)] for name in names]
    return table(["contender", *(f"T = {count}" for count in counts)], lines)


def by_contender(rows: list[Row], case: str) -> str:
    extra = {"long": ("against one thread", "threads_speedup"), "shared": ("against own prefixes", "shared_speedup")}
    head = ["contender", "threads", "KV MB", "ms", "against SDPA bf16", "against `enable_gqa`", "of reads"]
    lines = []
    for row in rows:
        name = row["contender"] + (", shared" if row["shared"] else "")
        line = [name, str(row["threads"]), f"{row['kv_bytes'] / 1e6:.1f}", ms(row), f"{row['speedup_fastest']:.2f}",
                f"{row['speedup_gqa']:.1f}", f"{row['bandwidth_share']:.0%}"]  # fmt: skip
        lines.append(line + ([optional(row[extra[case][1]], ".2f")] if case in extra else []))
    return table(head + ([extra[case][0]] if case in extra else []), lines)


def decode(rows: list[Row]) -> Iterator[str]:
    """All shapes, and how the time of one row grows with the context."""
    rows = latest(
        (row for row in rows if "contender" in row), ("cpu", "threads", "model", "contender", "batch", "context")
    )
    if not rows:
        return
    yield where(rows, "threads", "torch", "model") + " Medians of single steps of the whole batch, with quartiles."
    for machine in dict.fromkeys(machine_of(row) for row in rows):
        found = [row for row in rows if machine_of(row) == machine]
        yield f"**{machine}**"
        yield decode_table(found)
        yield from growth(found)


def decode_table(rows: list[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (row["batch"], row["context"])):
        shape = [str(row["batch"]), f"{row.get('tokens', row['context']):,}", row["contender"], row.get("dtype", DASH)]
        if "skipped" in row:
            lines.append([*shape, row["skipped"], DASH, DASH, DASH])
        else:
            lines.append([*shape, ms(row), f"{row['tokens_per_s']:.1f}", f"{row['kv_bytes'] / 1e6:.1f}",
                          optional(row["others_load"], ".2f")])  # fmt: skip
    head = ["rows", "tokens", "contender", "dtype", "ms a step", "tokens/s", "KV MB", "cores busy with others"]
    return table(head, lines)


def growth(rows: list[Row]) -> Iterator[str]:
    """How the time of one row grows with the context."""
    single = [row for row in rows if row["batch"] == 1 and "median_s" in row]
    contexts = sorted({row["context"] for row in single})
    if len(contexts) < 2:
        return
    times = {(row["contender"], row["context"]): row["median_s"] for row in single}
    short, long = contexts[0], contexts[-1]
    both = [
        name
        for name in dict.fromkeys(row["contender"] for row in single)
        if {(name, short), (name, long)} <= set(times)
    ]
    yield f"One row, a step at {long:,} tokens of context against one at {short:,}:"
    yield table(
        ["contender", f"ms at {short:,}", f"ms at {long:,}", "times as long"],
        [[name, f"{times[name, short] * 1e3:.1f}", f"{times[name, long] * 1e3:.1f}",
          f"{times[name, long] / times[name, short]:.2f}"] for name in both],
    )  # fmt: skip


def prefill(rows: list[Row]) -> Iterator[str]:
    rows = latest(rows, ("cpu", "threads", "tokens", "recipe"))
    if not rows:
        return
    yield (
        where(rows, "threads", "model", "dtype")
        + " Overheads are medians of the ratios within a repeat, with quartiles."
    )
    lines = []
    for row in sorted(rows, key=lambda row: row["tokens"]):
        low, high = row["overhead_full_percent_quartiles"]
        lines.append([f"{row['tokens']:,}", row["recipe"], f"{row['prefill_s']:.2f}",
                      f"{row['overhead_full_percent']:+.1f}% [{low:+.1f}, {high:+.1f}]",
                      f"{row['overhead_host_percent']:+.1f}%", f"{row['compress_s']:.3f}"])  # fmt: skip
    yield table(["tokens", "recipe", "prefill s", "against `full`", "against DynamicCache", "compress s"], lines)


def peers(rows: list[Row]) -> Iterator[str]:
    rows = latest(rows, ("cpu", "threads", "rows", "prompt_tokens", "peer", "configuration"))
    if not rows:
        return
    yield (
        where(rows, "threads")
        + " Medians of single steps of the whole batch, with half the distance between the quartiles."
    )
    lines = []
    for row in sorted(rows, key=lambda row: (row["rows"], row["prompt_tokens"])):
        shape = [f"{row['rows']} x {row['prompt_tokens']:,}", row["peer"], row["configuration"]]
        if "median_s" not in row:
            lines.append([*shape, "failed" if "failed" in row else "skipped", *[DASH] * 4])
            continue
        lines.append([*shape, f"{row['median_s'] * 1e3:.1f} ± {row['spread_s'] * 1e3:.1f}", f"{row['kv_bytes'] / 1e6:.1f}",
                      f"{row['peak_rss'] / 1e6:.0f}", optional(row.get("equal_tokens"), ".0%"),
                      optional(row["others_load"], ".2f")])  # fmt: skip
    head = [
        "rows x tokens",
        "engine",
        "configuration",
        "ms a step",
        "KV MB",
        "peak MB",
        "equal tokens",
        "cores busy with others",
    ]
    yield table(head, lines)


PARTS: dict[str, Callable[[list[Row]], Iterator[str]]] = {
    "kernels": kernels,
    "decode": decode,
    "prefill": prefill,
    "peers": peers,
}


def pictures() -> dict[str, Callable[[list[Row], Path], Any]]:
    """What draws itself from its rows; nothing without matplotlib. The prefill draws its own (`prefill.py --draw`)."""
    try:
        from benchmarks.pictures import draw_decode, draw_kernels
    except ModuleNotFoundError as error:
        notice(f'no pictures: {error}; pip install "stenokv[bench]"')
        return {}
    return {"kernels": draw_kernels, "decode": draw_decode}


def replaced(text: str, name: str, body: str) -> str | None:
    """The text with a new body between the markers of a part; None if it has no such markers."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        return None
    return text[: text.index(first) + len(first)] + f"\n\n{body}\n\n" + text[text.index(last) :]


def render(text: str, results: Path, figures: Path, link: str) -> str:
    """The text with every part that has rows; pictures are drawn into `figures`, which the text reaches as `link`."""
    draw = pictures()
    for name, part in PARTS.items():
        rows = [row for path in sorted(results.glob(f"{name}*.jsonl")) for row in read_rows(path)]
        blocks = list(part(rows))
        if not blocks:
            notice(f"{name}: no rows in {results}/{name}*.jsonl, left as it is")
            continue
        picture = figures / f"{name}.svg"
        if name in draw:
            draw[name](rows, picture)
        if picture.exists():
            blocks.insert(1, f"![{name}]({link}/{picture.name})")
        new = replaced(text, name, "\n\n".join(blocks))
        if new is None:
            notice(f"{name}: the text has no <!-- {name} --> … <!-- /{name} -->, left out")
        text = new or text
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    docs = HERE.parent / "docs"
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument("--document", type=Path, default=docs / "performance.md", metavar="FILE")
    parser.add_argument("--figures", type=Path, default=docs / "figures", metavar="FOLDER")
    args = parser.parse_args()
    link = Path(os.path.relpath(args.figures, args.document.resolve().parent)).as_posix()
    text = args.document.read_text("utf-8")
    args.document.write_text(render(text, args.results, args.figures, link), encoding="utf-8")


if __name__ == "__main__":
    main()
