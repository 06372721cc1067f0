"""The figures of docs/results.md: static SVG by Altair and vl-convert (extra `bench`); the same rows give the same file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from benchmarks.result_recipes import Entry
from benchmarks.result_summary import Summary

OURS, PEERS, FULL = "Steno", "peers", "full cache"
COLORS = alt.Scale(domain=[FULL, OURS, PEERS], range=["#333333", "#4c78a8", "#e45756"])


def who(entry: Entry) -> str:
    return FULL if entry.text == "full" else PEERS if entry.is_peer else OURS


def draw_recipes(summaries: Sequence[Summary], path: Path) -> None:
    """A line for each recipe: its score with the interval, and what it holds."""
    data = alt.Data(
        values=[
            {
                "recipe": s.name, "score": s.score.value, "low": s.score.low, "high": s.score.high, "share": s.share,
                "who": who(s.entry),
            }
            for s in summaries
        ]
    )  # fmt: skip
    order = [s.name for s in summaries]
    y = alt.Y("recipe:N", sort=order, title=None, axis=alt.Axis(labelLimit=330, labelFont="monospace", grid=True))
    color = alt.Color("who:N", scale=COLORS, legend=alt.Legend(title=None, orient="top"))
    x = alt.Scale(domain=[0, 1])
    score = alt.layer(
        alt.Chart(data)
        .mark_rule()
        .encode(x=alt.X("low:Q", scale=x, title="score, 95 %"), x2="high:Q", y=y, color=color),
        alt.Chart(data).mark_circle(size=55, opacity=1).encode(x=alt.X("score:Q", scale=x), y=y, color=color),
    ).properties(width=280, height=alt.Step(17))
    blank = alt.Y("recipe:N", sort=order, title=None, axis=None)
    held = (
        alt.Chart(data)
        .mark_bar()
        .encode(x=alt.X("share:Q", title="memory held, of full", axis=alt.Axis(format="%")), y=blank, color=color)
        .properties(width=200, height=alt.Step(17))
    )
    _save(alt.hconcat(score, held), path)


def draw_budgets(points: Sequence[tuple[Entry, int, Summary]], path: Path) -> None:
    """Score over what is held, a panel for each method, a line for each length."""
    data = alt.Data(
        values=[
            {
                "method": entry.form, "context": f"{context} tokens", "share": summary.share,
                "score": summary.score.value, "low": summary.score.low, "high": summary.score.high,
            }
            for entry, context, summary in points
        ]
    )  # fmt: skip
    x = alt.X("share:Q", title="held, of full", scale=alt.Scale(type="log", nice=False, padding=8),
              axis=alt.Axis(format=".0%", tickCount=3, labelOverlap=True))  # fmt: skip
    color = alt.Color(
        "context:N",
        sort=list(dict.fromkeys(f"{context} tokens" for _, context, _ in points)),
        legend=alt.Legend(title=None, orient="top"),
    )
    scale = alt.Scale(domain=[0, 1])
    base = alt.Chart().encode(x=x, color=color)
    chart = alt.layer(
        base.mark_line().encode(y=alt.Y("score:Q", scale=scale, title="score")),
        base.mark_circle(size=30, opacity=1).encode(y=alt.Y("score:Q", scale=scale)),
        base.mark_rule(opacity=0.6).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q"),
        data=data,
    ).properties(width=150, height=90)
    order = list(dict.fromkeys(entry.form for entry, _, _ in points))
    _save(chart.facet(facet=alt.Facet("method:N", title=None, sort=order), columns=4), path)


def _save(chart: Any, path: Path) -> None:
    chart = chart.configure(background="white").configure_view(strokeOpacity=0)
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    path.write_text(vl_convert.vegalite_to_svg(chart.to_dict(), version), encoding="utf-8")
