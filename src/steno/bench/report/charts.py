"""The charts as Vega-Lite, built with Altair. The page brings the data, by name, after its filters."""

from __future__ import annotations

from typing import Any

import altair as alt

POINTS, FRONT, NEEDLES = "points", "front", "needles"
PALETTE = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#eeca3b", "#ff9da6", "#9d755d", "#bab0ac",
    "#1f9e89", "#d67195", "#88d27a", "#5f6caf", "#d8b5a5", "#439894", "#b79a20", "#79706e", "#f2cf5b", "#83bcb6",
)  # fmt: skip


def quality_against(title: str, *, errors: bool, log: bool) -> dict[str, Any]:
    """Score over a cost: `points`, one numbered point a recipe, and `front`, the Pareto front as a step line.

    errors: whether the points have 95 % intervals.
    """
    points, line = alt.Chart(alt.NamedData(name=POINTS)), alt.Chart(alt.NamedData(name=FRONT))
    scale = alt.Scale(type="log", nice=False, padding=18) if log else alt.Scale(zero=False, nice=False, padding=18)
    x = alt.X("cost:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5, labelOverlap=True, grid=False))
    y = alt.Y("score:Q", title="score", scale=alt.Scale(domainMax=1, zero=False, padding=8))
    color = alt.Color("color:N", scale=None)
    tooltip = [
        alt.Tooltip("recipe:N"), alt.Tooltip("score:Q", format=".3f"), alt.Tooltip("cost:Q", title=title, format=",.2f"),
    ]  # fmt: skip
    layers: list[Any] = [
        line.mark_line(interpolate="step-after", strokeDash=[5, 4], strokeWidth=1.5, color="gray").encode(x=x, y=y),
        points.mark_point(filled=True, size=90, opacity=1).encode(x=x, y=y, color=color, tooltip=tooltip),
        points.mark_text(dx=9, dy=-8, fontSize=11).encode(x=x, y=y, text="number:N"),
    ]
    if errors:
        bar = alt.Y("low:Q", title="score")
        layers.insert(1, points.mark_rule(strokeWidth=1.5, opacity=0.7).encode(x=x, y=bar, y2="high:Q", color=color))
    chart = alt.layer(*layers).properties(
        width="container", height=230, description=f"Score of each recipe over {title}, with the Pareto front"
    )
    return _spec(chart)


def needle_grid() -> dict[str, Any]:
    """Found share over length and depth of the needle, of one recipe."""
    data = alt.Chart(alt.NamedData(name=NEEDLES))
    x = alt.X("context:O", title="context, tokens", axis=alt.Axis(labelAngle=0))
    y = alt.Y("depth:O", title="depth of the needle", sort=None)
    cells = data.mark_rect().encode(
        x=x, y=y,
        color=alt.Color("mean(score):Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"), legend=None),
        tooltip=[alt.Tooltip("context:O"), alt.Tooltip("depth:O"), alt.Tooltip("mean(score):Q", format=".0%", title="found")],
    )  # fmt: skip
    shares = data.mark_text(fontSize=10).encode(
        x=x, y=y, text=alt.Text("mean(score):Q", format=".0%"),
        color=alt.condition("datum.mean_score > 0.6", alt.value("black"), alt.value("white")),
    )  # fmt: skip
    return _spec(alt.layer(cells, shares).properties(width="container", height=230, description="Needles found"))


def _spec(chart: alt.LayerChart) -> dict[str, Any]:
    spec: dict[str, Any] = chart.to_dict(validate=True)
    spec.pop("config", None)  # the page brings its own, light or dark
    return spec
