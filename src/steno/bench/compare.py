"""The regression guard: what became better or worse against rows of an earlier run, beyond the intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from steno.bench.rows import Row
from steno.bench.stats import bootstrap, difference_interval

BYTES_SHARE = 0.01
"""Bytes are counted, not sampled; a change of up to a percent is rounding of pages."""
KL_NATS, KL_SHARE = 1e-3, 0.05
"""Drift below this is arithmetic in another order."""
TIME_SHARE, LEAST_S = 0.1, 0.01


@final
@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of one cell that changed. decides: whether it is a regression where it is worse; time alone is not."""

    row: Row
    what: str
    better: bool
    words: str
    decides: bool

    def __str__(self) -> str:
        row = self.row
        question = "" if row.protocol == "none" else f", question {row.protocol}"
        verdict = "better" if self.better else "worse "
        return f"{verdict} {row.task}, {row.context_tokens} tokens{question}, {row.recipe}: {self.what} {self.words}"


@final
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Changes of the cells that both have; cells that only one has; how many are compared, how many instance by instance."""

    changes: tuple[Change, ...]
    num_compared: int
    num_paired: int
    missing: tuple[Row, ...]

    @property
    def is_regression(self) -> bool:
        return any(change.decides and not change.better for change in self.changes)


def compare(rows: Sequence[Row], baseline: Sequence[Row]) -> Comparison:
    """Compares rows of the same model, recipe, task, protocol and length."""
    now = {(row.model_hash, *row.cell): row for row in rows}
    pairs = [(now[key], old) for old in baseline if (key := (old.model_hash, *old.cell)) in now]
    return Comparison(
        changes=tuple(change for new, old in pairs for change in _changes(new, old)),
        num_compared=len(pairs),
        num_paired=sum(new.instances == old.instances for new, old in pairs),
        missing=tuple(old for old in baseline if (old.model_hash, *old.cell) not in now),
    )


def _changes(new: Row, old: Row) -> Iterator[Change]:
    low, high, how = _score_change(new, old)
    if low > 0 or high < 0:
        words = f"{old.score:.3f} to {new.score:.3f} ({how})"
        yield Change(row=new, what="score", better=low > 0, words=words, decides=True)
    if new.kl is not None and old.kl is not None and abs(new.kl - old.kl) > KL_NATS + KL_SHARE * old.kl:
        kl_low, kl_high = _kl_change(new, old)
        if kl_low > 0 or kl_high < 0:
            words = f"{old.kl:.4f} to {new.kl:.4f} nats"
            yield Change(row=new, what="KL", better=kl_high < 0, words=words, decides=True)
    for what, after, before in (
        ("bytes held", new.kv_bytes, old.kv_bytes),
        ("peak bytes", new.kv_bytes_peak, old.kv_bytes_peak),
    ):
        if abs(after - before) > BYTES_SHARE * before:
            words = f"{before / 1e6:.2f} to {after / 1e6:.2f} MB"
            yield Change(row=new, what=what, better=after < before, words=words, decides=True)
    if (new.host, new.threads, new.dtype) == (old.host, old.threads, old.dtype):
        yield from _time_changes(new, old)


def _score_change(new: Row, old: Row) -> tuple[float, float, str]:
    """Interval of the change of the score: paired where the instances are the same, else from one interval to the other."""
    if new.instances == old.instances:
        change = difference_interval(new.scores, old.scores)
        return change.low, change.high, f"{change.value:+.3f}, {change.low:+.3f} to {change.high:+.3f}, paired"
    low, high = new.score_low - old.score_high, new.score_high - old.score_low
    return low, high, "other instances, intervals apart"


def _kl_change(new: Row, old: Row) -> tuple[float, float]:
    if new.instances == old.instances and new.kls and old.kls and len(new.kls) == len(old.kls):
        change = bootstrap([a - b for a, b in zip(new.kls, old.kls, strict=True)])
        return change.low, change.high
    return (new.kl_low or 0.0) - (old.kl_high or 0.0), (new.kl_high or 0.0) - (old.kl_low or 0.0)


def _time_changes(new: Row, old: Row) -> Iterator[Change]:
    """Medians that moved by more than a tenth, with quartiles apart; seconds by more than a hundredth of one."""
    for what, unit, name, least in (
        ("prefill", "s", "prefill_s", LEAST_S),
        ("compression", "s", "compress_s", LEAST_S),
        ("decoding", "ms a token", "decode_ms_per_token", 0.0),
    ):
        after, before = getattr(new, name), getattr(old, name)
        spread, was = getattr(new, f"{name}_quartiles"), getattr(old, f"{name}_quartiles")
        if after is None or before is None or abs(after - before) <= max(least, TIME_SHARE * before):
            continue
        if spread[0] > was[1] or spread[1] < was[0]:
            words = f"{before:.3g} to {after:.3g} {unit}"
            yield Change(row=new, what=what, better=after < before, words=words, decides=False)
