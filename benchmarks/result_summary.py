"""Rows of `make results-rows` put together: one recipe on several tasks, and tables of such."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.result_recipes import NEEDLES, TEXT, Entry

from steno.bench.rows import PEER, Row
from steno.bench.stats import Interval, difference_interval, mean_interval

DASH = "-"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A recipe at one length: its scores on all needle tasks together, and its drift on text."""

    entry: Entry
    score: Interval
    difference: Interval
    full: float
    instances: int
    kl: float | None
    top1: float | None
    kv_bytes: float
    share: float
    peak_share: float

    @property
    def name(self) -> str:
        return self.entry.text


def latest(rows: Iterable[Row]) -> dict[tuple[str, str, int], Row]:
    """The last row of each recipe, task and length."""
    return {(row.recipe.removeprefix(PEER), row.task, row.context_tokens): row for row in rows}


def pooled(found: dict[tuple[str, str, int], Row], entry: Entry, tasks: Sequence[str], context: int) -> Summary | None:
    """One recipe on several tasks; None where a needle task of them was not measured."""
    rows = [found.get((entry.text, task, context)) for task in tasks]
    own = [row for row in rows if row is not None]
    needles = [row for row in own if row.task in NEEDLES]
    if len(needles) < sum(task in NEEDLES for task in tasks):
        return None
    scores = [score for row in needles for score in row.scores]
    full = [score for row in needles for score in row.scores_full]
    text = [row for row in own if row.task in TEXT]
    full_bytes = sum(row.kv_bytes_full for row in needles)
    return Summary(
        entry=entry,
        score=mean_interval(scores),
        difference=difference_interval(scores, full),
        full=sum(full) / len(full),
        instances=len(scores),
        kl=text[0].kl if text else None,
        top1=text[0].top1_agreement if text else None,
        kv_bytes=sum(row.kv_bytes for row in needles) / len(needles),
        share=sum(row.kv_bytes for row in needles) / full_bytes,
        peak_share=max(row.kv_bytes_peak / row.kv_bytes_full for row in needles),
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
