"""Writing the report beside its rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from steno.bench.report.markdown import markdown
from steno.bench.rows import ROWS_FILE, Row

NEEDED = ("altair", "vl_convert")


def write_report(out: Path, rows: Sequence[Row]) -> list[Path]:
    """Writes report.md, and report.html if the extra `bench` is installed; returns what was written."""
    texts = {"report.md": markdown(rows)}
    if can_draw():
        from steno.bench.report.page import page  # its libraries are an extra

        texts["report.html"] = page(rows)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def is_current(out: Path) -> bool:
    """Whether the report of a folder was written after its last row."""
    names = ("report.md", "report.html") if can_draw() else ("report.md",)
    written = [(out / name).stat().st_mtime_ns for name in names if (out / name).is_file()]
    return len(written) == len(names) and min(written) > (out / ROWS_FILE).stat().st_mtime_ns


def can_draw() -> bool:
    """Whether what the HTML report needs is installed."""
    return all(importlib.util.find_spec(name) is not None for name in NEEDED)
