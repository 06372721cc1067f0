"""The runner: groups to rows, each written when it is done, the finished skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from steno.bench.measure import Measurement, Reference, measure
from steno.bench.plan import FULL, Group
from steno.bench.rows import ROWS_FILE, Row, append_row, drop_torn_line, read_rows
from steno.bench.summary import Subject, summarize
from steno.errors import BadArgument

Tick = Callable[[int], None]
"""Called with the prompt tokens of an instance that one recipe is through with."""


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measures groups with one model."""

    subject: Subject

    def reference(self, group: Group, tick: Tick) -> tuple[Row, list[Reference]]:
        """The full cache on a group: its row, and what recipes are compared with."""
        started = time.perf_counter()
        measured, references = self._measure(group, FULL, None, tick)
        scores = [m.score for m in measured]
        return summarize(self.subject, group, FULL, measured, scores, time.perf_counter() - started), references

    def row(self, group: Group, recipe: str, references: Sequence[Reference], tick: Tick) -> Row:
        """A recipe on a group."""
        started = time.perf_counter()
        measured, _ = self._measure(group, recipe, references, tick)
        return summarize(
            self.subject, group, recipe, measured, [r.score for r in references], time.perf_counter() - started
        )

    def _measure(
        self, group: Group, recipe: str, references: Sequence[Reference] | None, tick: Tick
    ) -> tuple[list[Measurement], list[Reference]]:
        measured, said = [], []
        for i, instance in enumerate(group.instances):
            reference = references[i] if references is not None else None
            measurement, trace = measure(self.subject.lm, group.task, instance, recipe, group.protocol, reference)
            measured.append(measurement)
            said.append(trace)
            tick(group.prompt_tokens[i])
        return measured, said


def open_rows(out: Path, experiment: tuple[str, str, str, int], groups: Sequence[Group], *, resume: bool) -> list[Row]:
    """The rows that a folder holds already, checked to belong to this run; makes the folder.

    Raises BadArgument if there are any and `resume` is not set, if they are of another model, dtype, device, seed or other
    instances, or if a line is broken.
    """
    path = out / ROWS_FILE
    if out.exists() and not out.is_dir():
        raise BadArgument(f"{out} is a file; --out names a folder.")
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_size == 0:
        return []
    if not resume:
        raise BadArgument(f"{path} has rows already: go on with --resume, or give another --out.")
    drop_torn_line(path)
    rows = read_rows(path)
    digests = {(g.task.id, g.protocol, g.row_context_tokens): g.digest for g in groups}
    for number, row in enumerate(rows, start=1):
        if row.experiment != experiment:
            names = ("model hash", "dtype", "device", "seed")
            pairs = zip(names, row.experiment, experiment, strict=True)
            other = ", ".join(f"{name} {theirs} instead of {ours}" for name, theirs, ours in pairs if theirs != ours)
            raise BadArgument(f"{path} has rows of another run (row {number}: {other}); give another --out.")
        if digests.get(row.cell[1:], row.instances) != row.instances:
            raise BadArgument(
                f"{path} has rows of other instances of {row.task} (row {number}: {row.samples} samples); give the same "
                "--samples and files, or another --out."
            )
    return rows


def todo(groups: Sequence[Group], rows: Sequence[Row]) -> list[tuple[Group, list[str]]]:
    """What is left of each group that is not finished."""
    done = {row.cell for row in rows}
    left = [(g, [r for r in g.recipes if (r, g.task.id, g.protocol, g.row_context_tokens) not in done]) for g in groups]
    return [(group, recipes) for group, recipes in left if recipes]


def work_tokens(groups: Sequence[tuple[Group, list[str]]]) -> int:
    """Prompt tokens to be read in all, the measure of progress; the full cache is read for every group."""
    return sum(sum(g.prompt_tokens) * len({FULL, *recipes}) for g, recipes in groups)


def run(bench: Bench, left: Sequence[tuple[Group, list[str]]], path: Path, tick: Tick) -> Iterator[Row]:
    """Measures what is left and yields each row after it is written."""
    for group, recipes in left:
        full, references = bench.reference(group, tick)
        for recipe in recipes:
            row = full if recipe == FULL else bench.row(group, recipe, references, tick)
            append_row(path, row)
            yield row
