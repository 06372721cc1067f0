"""The report as one HTML file that needs no network: rows, charts, library, style and script are in it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from string import Template
from typing import Any

import altair as alt
import vl_convert

from steno.bench.report.charts import PALETTE, needle_grid, quality_against
from steno.bench.report.verdict import facts, verdict
from steno.bench.rows import Row

DEPTH_BANDS = 10
_HEAVY = ("scores", "scores_full", "kls", "depths", "versions")


def page(rows: Sequence[Row]) -> str:
    """The page of some rows."""
    parts = files("steno.bench.report")
    data = {"rows": _shown(rows), "charts": _charts()}
    return Template(parts.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Recipes on {rows[0].model}"),
        verdict="\n".join(f'<p class="verdict">{_text(line)}</p>' for line in verdict(rows)),
        facts="".join(f"<dt>{html.escape(name)}</dt><dd>{_text(words)}</dd>" for name, words in facts(rows)),
        css=parts.joinpath("page.css").read_text(encoding="utf-8"),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        library=_library(),
        script=parts.joinpath("page.js").read_text(encoding="utf-8"),
    )


def _charts() -> dict[str, Any]:
    memory, time = "memory held, MB", "decode, ms a token"
    return {
        "bytes": quality_against(memory, errors=False, log=True),
        "time": quality_against(time, errors=False, log=False),
        "bytes_each": quality_against(memory, errors=True, log=True),
        "time_each": quality_against(time, errors=True, log=False),
        "needles": needle_grid(),
    }


def _shown(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the page needs of each row, with the number and the color of its recipe."""
    numbers = {recipe: n for n, recipe in enumerate(dict.fromkeys(row.recipe for row in rows))}
    return [
        {name: value for name, value in vars(row).items() if name not in _HEAVY}
        | {
            "context": row.context_tokens,
            "number": str(numbers[row.recipe] + 1),
            "color": PALETTE[numbers[row.recipe] % len(PALETTE)],
            "held_mb": row.kv_bytes / 1e6,
            "peak_mb": row.kv_bytes_peak / 1e6,
            "end_mb": row.kv_bytes_end / 1e6,
            "share": row.kv_bytes / row.kv_bytes_full,
            "needles": _needles(row),
        }
        for row in rows
    ]


def _needles(row: Row) -> list[dict[str, Any]] | None:
    """Each needle with the band of its depth."""
    if row.depths is None:
        return None
    bands = [min(int(depth * DEPTH_BANDS), DEPTH_BANDS - 1) * 100 // DEPTH_BANDS for depth in row.depths]
    return [
        {"context": row.context_tokens, "depth": f"{band:02}–{band + 100 // DEPTH_BANDS} %", "score": score}
        for band, score in zip(bands, row.scores, strict=True)
    ]


def _text(words: str) -> str:
    """Words as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(words))


@lru_cache(maxsize=1)
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`; bundling it takes seconds."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)).replace("</script", "<\\/script")
