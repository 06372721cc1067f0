"""Pictures of the benchmarks, from their rows; the same rows give the same file. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from benchmarks.common import Row, latest

matplotlib.use("agg")
matplotlib.rcParams.update({
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "svg.hashsalt": "steno",
})  # fmt: skip

from matplotlib import pyplot

KERNEL_KEY = ("case", "rows", "tokens", "queries", "contender", "shared", "threads")
DECODE_KEY = ("contender", "batch", "context")
INK = "C0"


def draw_kernels(rows: list[Row], path: Path) -> None:
    """One panel for each case that was measured."""
    rows = latest(rows, KERNEL_KEY)
    panels = [name for name in ("batch", "queries", "long", "shared") if any(row["case"] == name for row in rows)]
    if not panels:
        return
    figure, grid = pyplot.subplots(
        -(-len(panels) // 2), min(2, len(panels)), figsize=(5 * min(2, len(panels)), 3.8 * -(-len(panels) // 2)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, panels, strict=False):
        found = [row for row in rows if row["case"] == name]
        {"batch": _dots, "queries": _over_queries, "long": _by_threads, "shared": _by_sharing}[name](axes, found)
    _save(figure, path)


def _dots(axes: Any, rows: list[Row]) -> None:
    """Milliseconds of each contender, with the share of the read bandwidth."""
    for y, row in enumerate(rows[::-1]):
        color = INK if row["contender"].startswith("steno") else "0.4"
        axes.errorbar(row["median_s"] * 1e3, y, xerr=_errors([row]), fmt="o", ms=4, color=color)
        note = f"  {row['median_s'] * 1e3:.2f} ms, {row['bandwidth_share']:.0%} of reads"
        axes.annotate(note, (row["high_s"] * 1e3, y), va="center", fontsize=7, color="0.35")
    axes.set_yticks(range(len(rows)), [row["contender"] for row in rows[::-1]])
    axes.set_xscale("log")
    axes.margins(x=0.35)
    axes.set_xlabel("ms (log)")
    _title(axes, rows[0], f"T = {rows[0]['queries']}, {_threads(rows)}")


def _over_queries(axes: Any, rows: list[Row]) -> None:
    """A line for each format, and for SDPA in bf16 in the form that is fastest at each T."""
    queries = sorted({row["queries"] for row in rows})
    hosts = [row for row in rows if row["contender"].startswith("sdpa bf16")]
    lines = {"sdpa bf16, fastest form": [min((r for r in hosts if r["queries"] == t), key=_median) for t in queries]}
    for row in sorted((row for row in rows if row["contender"].startswith("steno")), key=lambda row: row["queries"]):
        lines.setdefault(row["contender"], []).append(row)
    for name, line in lines.items():
        style = {"color": "0.4", "linestyle": "--"} if name.startswith("sdpa") else {}
        axes.errorbar([r["queries"] for r in line], _ms(line), _errors(line), marker="o", ms=3, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(queries, queries)
    axes.set_xlabel("new tokens T of each row")
    axes.set_ylabel("ms (log)")
    axes.legend(fontsize=7)
    _title(axes, rows[0], _threads(rows))


def _by_threads(axes: Any, rows: list[Row]) -> None:
    free = [row["compute_speedup"] for row in rows if row["compute_speedup"]]
    _pairs(axes, rows, "threads", {threads: f"{threads} thread(s)" for threads in sorted({r["threads"] for r in rows})})
    note = f"; a loop without memory: {free[0]:.2f} times as fast on two" if free else ""
    _title(axes, rows[0], f"T = 1{note}")


def _by_sharing(axes: Any, rows: list[Row]) -> None:
    _pairs(axes, rows, "shared", {False: "each row its own", True: "one prefix shared"})
    _title(axes, rows[0], f"T = 1, {_threads(rows)}")


def _pairs(axes: Any, rows: list[Row], field: str, labels: dict[Any, str]) -> None:
    """Bars side by side for the values of one field."""
    names = _fastest_and_steno(rows)
    width = 0.8 / len(labels)
    for i, (value, label) in enumerate(labels.items()):
        found = {row["contender"]: row for row in rows if row[field] == value}
        bars = [found[name] for name in names if name in found]
        places = [n + (i - (len(labels) - 1) / 2) * width for n, name in enumerate(names) if name in found]
        axes.bar(places, _ms(bars), width * 0.9, yerr=_errors(bars), label=label, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_ylabel("ms")
    axes.legend(fontsize=7)


def _fastest_and_steno(rows: list[Row]) -> list[str]:
    """SDPA in bf16 in its fastest form, and steno in every format."""
    host = min((row for row in rows if row["contender"].startswith("sdpa bf16")), key=_median)
    return [host["contender"], *dict.fromkeys(r["contender"] for r in rows if r["contender"].startswith("steno"))]


def draw_decode(rows: list[Row], path: Path) -> None:
    """Time per step against context, one line for each contender, one panel for the smallest and the largest batch."""
    rows = [row for row in latest(rows, DECODE_KEY) if "median_s" in row]
    if not rows:
        return
    batches = sorted({row["batch"] for row in rows})
    lines = {batch: len({row["context"] for row in rows if row["batch"] == batch}) for batch in batches}
    panels = sorted({batches[0], max(batches, key=lambda batch: (lines[batch], batch))})
    figure, grid = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.2), layout="constrained", squeeze=False)
    for axes, batch in zip(grid.flat, panels, strict=True):
        for i, name in enumerate(dict.fromkeys(row["contender"] for row in rows)):
            line = sorted((r for r in rows if (r["contender"], r["batch"]) == (name, batch)), key=lambda r: r["tokens"])
            if not line:
                continue
            style = {"linestyle": "--"} if "Cache" in name else {}
            axes.errorbar([r["tokens"] for r in line], _ms(line), _errors(line), marker="o", ms=3, label=name,
                          color=f"C{i}", **style)  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("ms a step")
        axes.set_title(f"{batch} row(s)", fontsize=9)
    grid[0, 0].legend(fontsize=7)
    _save(figure, path)


def _median(row: Row) -> float:
    return float(row["median_s"])


def _ms(rows: list[Row]) -> list[float]:
    return [row["median_s"] * 1e3 for row in rows]


def _errors(rows: list[Row]) -> list[list[float]]:
    """How far the quartiles lie from the median."""
    return [
        [max(0.0, row["median_s"] - row["low_s"]) * 1e3 for row in rows],
        [max(0.0, row["high_s"] - row["median_s"]) * 1e3 for row in rows],
    ]


def _threads(rows: list[Row]) -> str:
    return f"{rows[0]['threads']} thread(s)"


def _title(axes: Any, row: Row, rest: str) -> None:
    axes.set_title(f"{row['rows']} x {row['tokens']:,} tokens, {rest}", fontsize=9)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
