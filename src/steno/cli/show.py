"""What people see: a progress bar on standard error, and small tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from steno.session import Progress as ProgressCallback


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[ProgressCallback | None]:
    """A bar on standard error that follows a read; nothing where standard error is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description:>9}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield advance


def print_table(rows: list[tuple[str, ...]]) -> None:
    """A plain table: the first column is text, the others are numbers."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for i in range(len(rows[0])):
        table.add_column(justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB"
