"""How `steno bench` goes about its work: plan, measure with a bar, report, compare."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO, final

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from steno.bench.cluster import Spec, run_on_ray
from steno.bench.compare import compare
from steno.bench.peers import PeerError, PeerMethod, Peers
from steno.bench.plan import Group, plan_groups
from steno.bench.report.write import can_draw, is_current, write_report
from steno.bench.rows import PEER, ROWS_FILE, Row, read_rows
from steno.bench.run import Bench, Tick, open_rows, run, todo, work_tokens
from steno.bench.summary import Subject
from steno.cli.bench import DEFAULT_CONTEXT, DEFAULT_RECIPES, DEFAULT_SAMPLES, DEFAULT_TASK
from steno.cli.show import megabytes
from steno.cli.status import FAILED, INTERRUPTED
from steno.errors import BadArgument
from steno.models.load import DEFAULT_MODEL
from steno.recipe import parse_recipe
from steno.session import LanguageModel, load

RowDone = Callable[[Row], None]


@final
@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be measured, as far as the command line says it, else what the earlier rows have, else the defaults."""

    model: str
    recipes: list[str]
    peers: list[str]
    tasks: list[str]
    contexts: list[int]
    protocols: list[str]
    samples: int
    seed: int
    cells: frozenset[tuple[str, str, str, int]] | None
    """Nothing but these, where all was taken from earlier rows."""

    @classmethod
    def of(cls, arguments: argparse.Namespace, earlier: Sequence[Row]) -> Wish:
        earlier = [row for row in earlier if not row.recipe.startswith(PEER)]
        sized = [row for row in earlier if row.sized]
        chosen = arguments.recipe or arguments.peer or arguments.task or arguments.context or arguments.protocol
        samples = max((row.samples for row in sized or earlier), default=DEFAULT_SAMPLES)
        return cls(
            model=arguments.model or (earlier[0].model if earlier else DEFAULT_MODEL),
            recipes=arguments.recipe or [row.recipe for row in earlier] or list(DEFAULT_RECIPES),
            peers=present_peers(arguments.peer or ()),
            tasks=arguments.task or [row.task for row in earlier] or [DEFAULT_TASK],
            contexts=arguments.context or [row.context_tokens for row in sized] or [DEFAULT_CONTEXT],
            protocols=arguments.protocol or [r.protocol for r in earlier if r.protocol != "none"] or ["unseen"],
            samples=samples if arguments.samples is None else arguments.samples,
            seed=(earlier[0].seed if earlier else 0) if arguments.seed is None else arguments.seed,
            cells=frozenset(row.cell for row in earlier) if earlier and not chosen else None,
        )

    def groups(self, lm: LanguageModel) -> list[Group]:
        """The groups to be measured, all that is wrong told."""
        groups = plan_groups(
            lm,
            recipes=self.recipes,
            peers=self.peers,
            tasks=self.tasks,
            contexts=self.contexts,
            protocols=self.protocols,
            samples=self.samples,
            seed=self.seed,
        )
        if self.cells is None:
            return groups
        wanted = [
            replace(
                g,
                recipes=tuple(r for r in g.recipes if (r, g.task.id, g.protocol, g.row_context_tokens) in self.cells),
            )
            for g in groups
        ]
        return [group for group in wanted if group.recipes]


def present_peers(texts: Sequence[str]) -> list[str]:
    """Those that are installed; a notice for each project that is not."""
    methods = [PeerMethod.parse(text) for text in texts]
    peers = Peers()
    for project in dict.fromkeys(method.project for method in methods):
        if not peers.installed(project):
            print(
                f'steno: {project} is not installed, its rows are left out; in a checkout: make peers PEERS="{project}"',
                file=sys.stderr,
            )
    return [str(method) for method in methods if peers.installed(method.project)]


def run_bench(arguments: argparse.Namespace) -> int:
    """Plans, measures, reports and compares; the exit status of the command."""
    for recipe in arguments.recipe or ():
        parse_recipe(recipe)  # a typing mistake is told before anything is loaded
    if arguments.peer and arguments.ray:
        raise BadArgument("peers run on this machine alone: give --peer or --ray, not both.")
    earlier = read_rows(Path(arguments.against)) if arguments.against else []
    if arguments.against and not earlier:
        raise BadArgument(f"{arguments.against} has no rows to compare with.")
    wish, out = Wish.of(arguments, earlier), Path(arguments.out)
    dtype = arguments.dtype or (earlier[0].dtype if earlier else None)
    lm = load(wish.model, dtype=dtype, device=arguments.device)
    subject = Subject.of(lm, wish.model, wish.seed)
    groups = wish.groups(lm)
    rows = open_rows(out, subject.experiment, groups, resume=arguments.resume)
    before = len(rows)
    try:
        with FileLock(out / f"{ROWS_FILE}.lock", timeout=0):
            try:
                failed = _measure(arguments, subject, groups, rows, out)
            finally:
                if rows:
                    _report(out, rows)
    except Timeout:
        raise BadArgument(f"another bench is writing to {out}; wait for it, or give another --out.") from None
    except KeyboardInterrupt:
        print(
            f"\nsteno: interrupted; {len(rows)} rows ({len(rows) - before} new) are in {out / ROWS_FILE}; go on with --resume.",
            file=sys.stderr,
        )
        return INTERRUPTED
    if arguments.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    status = _compare(rows, earlier, sys.stderr if arguments.json else sys.stdout) if earlier else 0
    return FAILED if failed else status


def _measure(
    arguments: argparse.Namespace, subject: Subject, groups: Sequence[Group], rows: list[Row], out: Path
) -> int:
    """Measures what is missing and adds it to `rows`; how many rows of peers failed."""
    left = todo(groups, rows)
    num_left = sum(len(recipes) for _, recipes in left)
    if rows:
        print(f"steno: {len(rows)} rows are there already, {num_left} are left", file=sys.stderr)
    if not left:
        return 0
    num_failed = 0

    def failed(group: Group, recipe: str, error: PeerError) -> None:
        nonlocal num_failed
        num_failed += 1
        print(f"steno: {recipe} failed on {group.task.id} {group.row_context_tokens}: {error}", file=sys.stderr)

    peers = Peers()
    with peers, _bar(work_tokens(left), num_left) as (tick, done):
        if arguments.ray:
            spec = Spec(model=subject.model, dtype=subject.experiment[1], device=arguments.device, seed=subject.seed)
            found = run_on_ray(arguments.ray, spec, left, out / ROWS_FILE, tick)
        else:
            found = run(Bench(subject=subject, peers=peers), left, out / ROWS_FILE, tick, failed)
        for row in found:
            rows.append(row)
            done(row)
    return num_failed


def _report(out: Path, rows: Sequence[Row]) -> None:
    if is_current(out):
        print(f"steno: the report in {out} has all rows", file=sys.stderr)
        return
    written = write_report(out, rows)
    print(f"steno: wrote {', '.join(map(str, written))}", file=sys.stderr)
    if not can_draw():
        print("steno: for report.html: pip install 'stenokv[bench]'", file=sys.stderr)


def _compare(rows: Sequence[Row], earlier: Sequence[Row], file: TextIO) -> int:
    found = compare(rows, earlier)
    if not found.num_compared:
        raise BadArgument(
            "no row has the model, recipe, task, protocol and length of an earlier one; nothing to compare."
        )
    for change in found.changes:
        print(change, file=file)
    words = f"{found.num_compared} rows compared, {found.num_paired} of them instance by instance"
    missing = f"; {len(found.missing)} earlier rows were not measured now" if found.missing else ""
    print(f"{words}{missing}: {len(found.changes) or 'no'} changes beyond the intervals", file=file)
    return FAILED if found.is_regression else 0


@contextmanager
def _bar(num_tokens: int, num_rows: int) -> Iterator[tuple[Tick, RowDone]]:
    """A bar over the tokens to be read, with the time left, and a line on standard error for each row."""
    console, finished = Console(stderr=True), 0
    columns = (
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
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
