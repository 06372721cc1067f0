"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from steno.bench.report.verdict import facts, front, groups_of, signed, verdict
from steno.bench.rows import Row

COLUMNS = (
    "recipe", "score (95 %)", "full", "difference (95 %)", "KL", "top-1", "held MB", "of full", "peak MB", "bits/value",
    "prefill s", "compress s", "first token s", "ms/token", "front",
)  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """Header, verdict, and a table for each task, length and protocol; `B` and `T` mark the fronts of bytes and time."""
    lines = [f"# Recipes on {rows[0].model}", "", *verdict(rows), ""]
    lines += [f"- {name}: {words}" for name, words in facts(rows)]
    lines += ["- Fronts: `B`, nothing smaller scores as high; `T`, nothing that decodes faster does."]
    for (task, context, protocol), group in groups_of(rows).items():
        question = "" if protocol == "none" else f", question {protocol}"
        lines += ["", f"## {task}, {context:,} tokens{question}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        small = {row.recipe for row in front(group, lambda row: row.kv_bytes)}
        fast = {row.recipe for row in front(group, lambda row: row.decode_ms_per_token)}
        for row in sorted(group, key=lambda row: row.kv_bytes):
            marks = " ".join(m for m, on in (("B", row.recipe in small), ("T", row.recipe in fast)) if on)
            lines.append(_line([*_cells(row), marks]))
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    notes = "" if row.frees_memory or row.recipe == "full" else " (frees nothing)"
    refused = f" ({row.refused} refused)" if row.refused else ""
    return [
        f"`{row.recipe}`{notes}".replace("|", "\\|"),
        f"{row.score:.3f} ({row.score_low:.2f} to {row.score_high:.2f}){refused}",
        f"{row.score_full:.3f}",
        f"{signed(row.difference)} ({signed(row.difference_low)} to {signed(row.difference_high)})",
        "-" if row.kl is None else f"{row.kl:.4f}",
        "-" if row.top1_agreement is None else f"{row.top1_agreement:.1%}",
        f"{row.kv_bytes / 1e6:.2f}",
        f"{row.kv_bytes / row.kv_bytes_full:.1%}",
        f"{row.kv_bytes_peak / 1e6:.2f}",
        f"{row.bits_per_value:.2f}",
        f"{row.prefill_s:.2f}",
        f"{row.compress_s:.2f}",
        "-" if row.ttft_s is None else f"{row.ttft_s:.2f}",
        "-" if row.decode_ms_per_token is None else f"{row.decode_ms_per_token:.1f}",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
