"""Measure the rows of docs/results.md: every recipe of result_recipes.py on its tasks, written as they are done.

The budget at which every task is measured comes first, then the others. Goes on where it stopped: what is there already is
skipped. A recipe that refuses a prompt (a window longer than its budget, say) and a peer that fails are told and left out.
Exit status: 0 all was measured or refused, 1 a peer failed or is not installed, 2 the file has rows of something else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
# as in the other scripts: nothing in this folder is to pass for an installed package
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

from benchmarks.common import notice
from benchmarks.result_recipes import CONTEXTS, DTYPE, MIDDLE, MODEL, SEED, TASKS, wanted

import steno
from steno.bench.peers import PeerError, PeerMethod, Peers
from steno.bench.plan import FULL, Group, plan_groups
from steno.bench.rows import Row, append_row, drop_torn_line, read_rows
from steno.bench.run import Bench
from steno.bench.summary import Subject
from steno.errors import BadArgument
from steno.session import LanguageModel

Key = tuple[str, str, str, int, str]


def key(row: Row) -> Key:
    return (*row.cell, row.instances)


def present(path: Path, experiment: tuple[str, str, str, int]) -> list[Row]:
    """The rows of the file; leaves with status 2 if they are of another model, dtype, device or seed."""
    if not path.exists():
        return []
    drop_torn_line(path)
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        if row.experiment != experiment:
            notice(f"{path}, line {number}: measured with {row.experiment}, not {experiment}; give another --out")
            sys.exit(2)
    return rows


def groups(lm: LanguageModel, peers: Peers, contexts: Sequence[int], tasks: Sequence[str]) -> tuple[list[Group], bool]:
    """What is to be measured, what tells most first; whether a peer is missing."""
    found, missing = [], set()
    for first, context, task in product((True, False), contexts, tasks):
        texts = [entry for entry in wanted(task) if (entry.budget in (None, MIDDLE)) == first]
        if texts:
            others = [PeerMethod.parse(entry.text) for entry in texts if entry.is_peer]
            missing |= {method.project for method in others if not peers.installed(method.project)}
            [group] = plan_groups(
                lm, recipes=[], peers=[str(m) for m in others if peers.installed(m.project)], tasks=[task],
                contexts=[context], protocols=["unseen"], samples=TASKS[task], seed=SEED,
            )  # fmt: skip
            recipes = tuple(entry.text for entry in texts if not entry.is_peer)
            found.append(
                Group(
                    task=group.task,
                    context_tokens=context,
                    protocol=group.protocol,
                    recipes=recipes + group.recipes,
                    instances=group.instances,
                    prompt_tokens=group.prompt_tokens,
                )
            )
    for name in sorted(missing):
        notice(f'{name} is not installed, its rows are left out: make peers PEERS="{name}"')
    return found, bool(missing)


def measure(bench: Bench, group: Group, recipes: list[str], path: Path) -> bool:
    """Measures and writes the rows of a group; whether a peer failed."""
    full, references = bench.reference(group, lambda tokens: None)
    failed = False
    for recipe in recipes:
        where = f"{group.task.id} {group.context_tokens}, {recipe}"
        try:
            row = full if recipe == FULL else bench.row(group, recipe, references, lambda tokens: None)
        except BadArgument as error:
            notice(f"{where}: refused: {error}")
            continue
        except PeerError as error:
            failed = True
            notice(f"{where}: {error}")
            continue
        append_row(path, row)
        notice(f"{where}: {row.score:.3f} of {row.score_full:.3f}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"bench-{MODEL}.jsonl", metavar="FILE")
    parser.add_argument("--context", action="append", type=int, choices=CONTEXTS, help="only this length; repeatable")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this task; repeatable")
    args = parser.parse_args()
    lm = steno.load(MODEL, dtype=DTYPE)
    subject = Subject.of(lm, MODEL, SEED)
    done = {key(row) for row in present(args.out, subject.experiment)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with Peers() as peers:
        planned, failed = groups(lm, peers, args.context or CONTEXTS, args.task or list(TASKS))
        bench = Bench(subject=subject, peers=peers)
        for group in planned:
            keys = {
                r: (r, group.task.id, group.protocol, group.row_context_tokens, group.digest) for r in group.recipes
            }
            left = [recipe for recipe in group.recipes if keys[recipe] not in done]
            if left:
                failed |= measure(bench, group, left, args.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
