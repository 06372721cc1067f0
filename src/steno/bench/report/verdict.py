"""What the rows say in plain language: the fronts, and which recipe to take."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import final

from steno.bench.plan import FULL
from steno.bench.rows import PEER, Row

Cost = Callable[[Row], float | None]
GroupKey = tuple[str, int, str]


@final
@dataclass(frozen=True, kw_only=True)
class Mean:
    """A recipe over all groups: the means of its rows, and whether some row shows a loss."""

    recipe: str
    score: float
    kv_bytes: float
    decode_ms_per_token: float | None
    share: float
    worst: Row
    loses: bool


def groups_of(rows: Iterable[Row]) -> dict[GroupKey, list[Row]]:
    """Rows by task, length and protocol, in the order they came."""
    found: dict[GroupKey, list[Row]] = {}
    for row in rows:
        found.setdefault((row.task, row.context_tokens, row.protocol), []).append(row)
    return found


def front(rows: Sequence[Row], cost: Cost) -> list[Row]:
    """The Pareto front, cheapest first: rows such that no other costs as little and scores as high."""
    best, found = float("-inf"), []
    priced = [(price, row) for row in rows if (price := cost(row)) is not None]
    for _, row in sorted(priced, key=lambda pair: (pair[0], -pair[1].score)):
        if row.score > best:
            best = row.score
            found.append(row)
    return found


def means(rows: Sequence[Row]) -> list[Mean]:
    """Recipes that were measured on every group, smallest first; a group that only the full cache has does not count."""
    groups = [group for group in groups_of(rows).values() if any(row.recipe != FULL for row in group)]
    found = []
    for recipe in dict.fromkeys(row.recipe for group in groups for row in group):
        own = [row for group in groups for row in group if row.recipe == recipe]
        if len(own) < len(groups):
            continue
        times = [row.decode_ms_per_token for row in own if row.decode_ms_per_token is not None]
        found.append(
            Mean(
                recipe=recipe,
                score=_mean([row.score for row in own]),
                kv_bytes=_mean([row.kv_bytes for row in own]),
                decode_ms_per_token=_mean(times) if len(times) == len(own) else None,
                share=sum(row.kv_bytes for row in own) / sum(row.kv_bytes_full for row in own),
                worst=min(own, key=lambda row: row.difference),
                loses=any(row.difference_high < 0 for row in own),
            )
        )
    return sorted(found, key=lambda mean: mean.kv_bytes)


def verdict(rows: Sequence[Row]) -> list[str]:
    """Sentences: which recipe holds least without a loss that could be shown, and how small a loss could be seen."""
    candidates = [mean for mean in means(rows) if mean.recipe != FULL and not mean.recipe.startswith(PEER)]
    if not candidates:
        return ["No recipe beside the full cache was measured on all tasks."]
    lines = []
    good = [mean for mean in candidates if not mean.loses]
    if good:
        first = good[0]
        worst = first.worst
        lines.append(
            f"Smallest memory without a loss that could be shown: `{first.recipe}`, which holds {first.kv_bytes / 1e6:.2f} MB, "
            f"{first.share:.0%} of the full cache. Where it does worst, {worst.task} at {worst.context_tokens} tokens, it scores "
            f"{worst.score:.2f} against {worst.score_full:.2f} (difference {signed(worst.difference)}, between "
            f"{signed(worst.difference_low)} and {signed(worst.difference_high)})."
        )
    else:
        lines.append("Every recipe that was measured loses against the full cache on some task.")
    losing = [f"`{mean.recipe}` ({mean.worst.task})" for mean in candidates if mean.loses]
    if losing and good:
        lines.append(f"A loss beyond chance shows in {', '.join(losing)}.")
    blind = max(-row.difference_low for row in rows if row.recipe != FULL and row.difference_high >= 0) if good else 0
    if blind > 0.02:
        lines.append(
            f"With {min(row.samples for row in rows)} instances a task a loss of up to {blind:.2f} can hide in the intervals; "
            "more --samples make them narrower."
        )
    return lines


def facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was measured, on what, and what was kept fixed: pairs of a name and words."""
    first = rows[0]
    dates = sorted(row.measured_at[:10] for row in rows)
    hosts = dict.fromkeys(f"{row.host}, {row.threads} thread{'s' * (row.threads != 1)}" for row in rows)
    # each once: the rows of a peer have its versions beside ours
    versions = dict.fromkeys(f"{name} {version}" for row in rows for name, version in row.versions.items())
    commits = dict.fromkeys(row.git_sha[:12] + "-dirty" * row.git_sha.endswith("-dirty") for row in rows if row.git_sha)
    samples = sorted({row.samples for row in rows})
    return [
        ("Model", f"{first.model} ({first.model_hash}), computing in {first.dtype} on {first.device}"),
        ("Machine", "; ".join(hosts)),
        ("Versions", ", ".join(versions) + (f"; commit {', '.join(commits)}" if commits else "")),
        ("Measured", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"),
        (
            "Kept fixed",
            f"the same instances for every recipe (seed {first.seed}, {' or '.join(map(str, samples))} a task), greedy "
            "decoding, one sequence at a time, one machine",
        ),
        (
            "Read it so",
            "scores run from 0 to 1, more is better; bytes are measured on what is held; seconds are medians over the "
            "instances and their spread the quartiles; intervals are 95 %, Wilson or Newcombe for right-or-wrong, bootstrap "
            "else; KL and agreement are against the full cache, token by token. Unseen: compression does not know the "
            "question.",
        ),
        ("Measure it again", f"`{command(rows)}`"),
    ]


def command(rows: Sequence[Row]) -> str:
    """The command that measures these rows."""
    first, sized = rows[0], [row for row in rows if row.sized]
    words = ["steno", "bench", "--model", first.model]
    for name, values in (
        ("--recipe", [row.recipe for row in rows if not row.recipe.startswith(PEER)]),
        ("--peer", [row.recipe.removeprefix(PEER) for row in rows if row.recipe.startswith(PEER)]),
        ("--task", [row.task for row in rows]),
        ("--context", [row.context_tokens for row in sized]),
        ("--protocol", [row.protocol for row in rows if row.protocol != "none"]),
    ):
        for value in dict.fromkeys(values):
            words += [name, str(value)]
    words += ["--samples", str(max(row.samples for row in sized or rows)), "--seed", str(first.seed)]
    return shlex.join([*words, "--dtype", first.dtype])


def signed(value: float) -> str:
    """A difference with its sign and two decimals; a true minus."""
    return f"{value:+.2f}".replace("-", "−")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
