"""The runner: groups to rows, each written when it is done, the finished skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import final

from steno.bench.measure import Measurement, Read, Reference, measure, own
from steno.bench.peers import PeerError, PeerMethod, Peers
from steno.bench.plan import FULL, Group
from steno.bench.rows import PEER, ROWS_FILE, Row, append_row, drop_torn_line, read_rows
from steno.bench.summary import Subject, summarize
from steno.errors import BadArgument

Tick = Callable[[int], None]
"""Called with the prompt tokens of an instance that one recipe is through with."""
Failed = Callable[[Group, str, PeerError], None]


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measures groups with one model. peers: the workers of other projects, where there are any to be measured."""

    subject: Subject
    peers: Peers | None = None

    def reference(self, group: Group, tick: Tick) -> tuple[Row, list[Reference]]:
        """The full cache on a group: its row, and what recipes are compared with."""
        started = time.perf_counter()
        measured, references = self._measure(group, own(self.subject.lm, FULL), None, tick)
        scores = [m.score for m in measured]
        return summarize(self.subject, group, FULL, measured, scores, time.perf_counter() - started), references

    def row(self, group: Group, recipe: str, references: Sequence[Reference], tick: Tick) -> Row:
        """A recipe or a peer's method on a group."""
        started = time.perf_counter()
        read, versions = own(self.subject.lm, recipe), dict[str, str]()
        if recipe.startswith(PEER):
            read, versions = self._peer(PeerMethod.parse(recipe.removeprefix(PEER)))
        measured, _ = self._measure(group, read, references, tick)
        row = summarize(
            self.subject, group, recipe, measured, [r.score for r in references], time.perf_counter() - started
        )
        return replace(row, versions=row.versions | versions)

    def _peer(self, method: PeerMethod) -> tuple[Read, dict[str, str]]:
        """How a peer reads, and its versions."""
        if self.peers is None:
            raise BadArgument(f"{method} is a peer's, and no peers run here.")
        worker = self.peers.worker(method.project, self.subject.lm)
        return partial(worker.read, method), worker.versions

    def _measure(
        self, group: Group, read: Read, references: Sequence[Reference] | None, tick: Tick
    ) -> tuple[list[Measurement], list[Reference]]:
        measured, said = [], []
        for i, instance in enumerate(group.instances):
            reference = references[i] if references is not None else None
            measurement, trace = measure(self.subject.lm, group.task, instance, read, group.protocol, reference)
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


def run(
    bench: Bench, left: Sequence[tuple[Group, list[str]]], path: Path, tick: Tick, failed: Failed | None = None
) -> Iterator[Row]:
    """Measures what is left and yields each row after it is written.

    failed: is told where a peer fails, and the run goes on; without it that is raised.
    """
    for group, recipes in left:
        full, references = bench.reference(group, tick)
        for recipe in recipes:
            try:
                row = full if recipe == FULL else bench.row(group, recipe, references, tick)
            except PeerError as error:
                if failed is None:
                    raise
                failed(group, recipe, error)
                continue
            append_row(path, row)
            yield row
