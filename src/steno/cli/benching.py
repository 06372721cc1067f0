"""How `steno bench` goes about its work: plan, measure with a bar, report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from steno.bench.plan import Group, plan_groups
from steno.bench.report.write import can_draw, write_report
from steno.bench.rows import ROWS_FILE, Row
from steno.bench.run import Bench, Tick, open_rows, run, todo, work_tokens
from steno.bench.summary import Subject
from steno.cli.bench import DEFAULT_CONTEXT, DEFAULT_RECIPES
from steno.cli.show import megabytes
from steno.errors import BadArgument
from steno.models.load import DEFAULT_MODEL
from steno.recipe import parse_recipe
from steno.session import load

INTERRUPTED = 130
RowDone = Callable[[Row], None]


def run_bench(arguments: argparse.Namespace) -> int:
    """Plans, measures and reports; the exit status of the command."""
    recipes = arguments.recipe or list(DEFAULT_RECIPES)
    for recipe in recipes:
        parse_recipe(recipe)  # a typing mistake is told before anything is loaded
    model, out = arguments.model or DEFAULT_MODEL, Path(arguments.out)
    lm = load(model, dtype=arguments.dtype, device=arguments.device)
    subject = Subject(lm=lm, model=model, seed=arguments.seed or 0)
    groups = plan_groups(
        lm,
        recipes=recipes,
        tasks=arguments.task or ["niah"],
        contexts=arguments.context or [DEFAULT_CONTEXT],
        protocols=arguments.protocol or ["unseen"],
        samples=20 if arguments.samples is None else arguments.samples,
        seed=subject.seed,
    )
    rows = open_rows(out, subject.experiment, groups, resume=arguments.resume)
    try:
        with FileLock(out / f"{ROWS_FILE}.lock", timeout=0):
            try:
                _measure(Bench(subject=subject), groups, rows, out)
            finally:
                if rows:
                    _report(out, rows)
    except Timeout:
        raise BadArgument(f"another bench is writing to {out}; wait for it, or give another --out.") from None
    except KeyboardInterrupt:
        print(f"\nsteno: interrupted; {len(rows)} rows are in {out / ROWS_FILE}, go on with --resume.", file=sys.stderr)
        return INTERRUPTED
    if arguments.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    return 0


def _measure(bench: Bench, groups: Sequence[Group], rows: list[Row], out: Path) -> None:
    """Measures what is missing and adds it to `rows`."""
    left = todo(groups, rows)
    if rows:
        print(f"steno: {len(rows)} rows are there already, {sum(len(r) for _, r in left)} are left", file=sys.stderr)
    with _bar(work_tokens(left), sum(len(r) for _, r in left)) as (tick, done):
        for row in run(bench, left, out / ROWS_FILE, tick):
            rows.append(row)
            done(row)


def _report(out: Path, rows: Sequence[Row]) -> None:
    written = write_report(out, rows)
    print(f"steno: wrote {', '.join(map(str, written))}", file=sys.stderr)
    if not can_draw():
        print("steno: for report.html: pip install 'stenokv[bench]'", file=sys.stderr)


@contextmanager
def _bar(num_tokens: int, num_rows: int) -> Iterator[tuple[Tick, RowDone]]:
    """A bar over the tokens to be read, with the time left, and a line on standard error for each row."""
    console, finished = Console(stderr=True), 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"row 1 of {num_rows}", total=num_tokens)

        def done(row: Row) -> None:
            nonlocal finished
            finished += 1
            bar.update(task, description=f"row {min(finished + 1, num_rows)} of {num_rows}")
            where = f"{row.task} {row.context_tokens} {row.protocol}"
            line = (
                f"{finished}/{num_rows} {where}: score {row.score:.3f} of {row.score_full:.3f}, "
                f"{megabytes(row.kv_bytes)} of {megabytes(row.kv_bytes_full)}  {row.recipe}"
            )
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        yield lambda tokens: bar.advance(task, tokens), done
