"""Decode speed and KV bytes of Steno next to its peers: same prompts as token ids, same machine, one run.

Each configuration is measured in a process of its own, under the Python of its engine (`.peers/NAME`, made by `make peers`;
Steno under this one). Rows are appended to --json as they finish. What each engine is and how its weights differ stands in
the rows and in docs/peers.md. A peer that is not installed is left out with a notice; a worker that fails is reported.

Times are of one decode step of the whole batch, median and half the distance between the quartiles. `equal` is the share of
greedy tokens equal to those of Steno's full cache at the same places. `others` is how many cores other processes kept busy
meanwhile: where it is not near 0, the times say little.

Exit status: 0 all configurations that are there were measured, 1 some failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# as in the other scripts: nothing in this folder is to pass for an installed package
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

from benchmarks.common import OtherLoad, Row, append_row, cpu_name, notice, quartiles, read_rows, today

WORKERS = HERE / "peers"
NAMES = ("steno", "transformers", "libllama", "llamacpp", "openvino", "vllm")
REFERENCE = ("steno", "full")
"""The row whose tokens the others are compared with: nothing is dropped or rounded in it."""


class WorkerFailed(Exception):
    """A worker ended without an answer; the message has the end of what it printed."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One engine: the Python that has it, and its worker."""

    name: str
    python: Path
    worker: Path

    @property
    def installed(self) -> bool:
        return self.python.exists()

    def configurations(self) -> list[str]:
        return self._run(["--list"], "", 300).split("\n")[:-1]

    def measure(self, request: Row, timeout_s: float) -> Row:
        """The answer of a worker to one request."""
        return dict(json.loads(self._run([], json.dumps(request), timeout_s)))

    def _run(self, arguments: list[str], stdin: str, timeout_s: float) -> str:
        environment = {
            name: value for name, value in os.environ.items() if self.name == "steno" or name != "PYTHONPATH"
        }
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            try:
                done = subprocess.run(
                    [str(self.python), str(self.worker), *arguments],
                    input=stdin, stdout=subprocess.PIPE, stderr=log, text=True, timeout=timeout_s, env=environment,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise WorkerFailed(f"not done after {timeout_s:.0f} s") from error
            if done.returncode == 0:
                return done.stdout
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
        raise WorkerFailed("\n".join([f"exit status {done.returncode}", *lines[-8:]]))


def find_peers(names: Sequence[str], folder: Path) -> list[Peer]:
    pythons = {name: folder / name / "bin/python" for name in names} | {"steno": Path(sys.executable)}
    return [Peer(name=name, python=pythons[name], worker=WORKERS / f"run_{name}.py") for name in names]


def bench(peers: Iterable[Peer], request: Row, *, match: str = "", timeout_s: float = 900) -> Iterator[Row]:
    """One row for each configuration whose name contains `match`, with `failed` or `skipped` where there is nothing to show."""
    for peer in peers:
        if not peer.installed:
            notice(f"{peer.name}: not installed, left out (`make peers`)")
            continue
        try:
            names = peer.configurations()
        except WorkerFailed as error:
            notice(f"{peer.name}: {error}")
            yield {"peer": peer.name, "configuration": "", "failed": str(error)}
            continue
        for name in names:
            if match not in name:
                continue
            row: Row = {"peer": peer.name, "configuration": name}
            notice(f"{peer.name}: {name}")
            others = OtherLoad()
            try:
                row |= peer.measure(request | {"configuration": name}, timeout_s)
            except WorkerFailed as error:
                row |= {"failed": str(error)}
            row["others_load"] = others.cores()
            if reason := row.get("failed") or row.get("skipped"):
                notice(f"  {'failed' if 'failed' in row else 'skipped'}: {reason}")
            yield row


def summarize(row: Row, reference: Sequence[Sequence[int]] | None) -> Row:
    """Adds median, spread and the share of tokens equal to the reference; keeps the step times, drops the nesting."""
    timeline = row.pop("timeline", None)
    if timeline is None:
        return row
    low, median, high = quartiles(timeline["step_s"])
    row |= {"median_s": median, "spread_s": (high - low) / 2, **timeline}
    if reference is not None:
        pairs = [pair for ours, theirs in zip(reference, row["tokens"]) for pair in zip(ours, theirs)]  # noqa: B905
        row["equal_tokens"] = sum(a == b for a, b in pairs) / len(pairs)  # rows and tokens that both have
    return row


def reference_tokens(rows: Iterable[Row], shape: Row) -> list[list[int]] | None:
    """The tokens of the last reference row of this shape and text, if there is one."""
    found = None
    for row in rows:
        if (row["peer"], row["configuration"]) == REFERENCE and "tokens" in row and shape.items() <= row.items():
            found = row["tokens"]
    return found


def print_table(rows: Iterable[Row]) -> None:
    print(
        f"\n{'engine':13} {'configuration':44} {'ms a step':>16} {'KV MB':>8} {'peak MB':>8} {'equal':>6} {'prefill s':>9}"
    )
    for row in rows:
        if "median_s" not in row:
            print(f"{row['peer']:13} {row['configuration']:44} {'failed' if 'failed' in row else 'skipped':>16}")
            continue
        times = f"{row['median_s'] * 1e3:.1f} ± {row['spread_s'] * 1e3:.1f}"
        equal = f"{row['equal_tokens']:.0%}" if "equal_tokens" in row else "-"
        print(
            f"{row['peer']:13} {row['configuration']:44} {times:>16} {row['kv_bytes'] / 1e6:8.1f} "
            f"{row['peak_rss'] / 1e6:8.0f} {equal:>6} {row['prefill_s']:9.1f} "
            f"{'-' if row['others_load'] is None else format(row['others_load'], '.2f'):>6}"
        )


def prepare(folder: Path, rows: int, tokens: int) -> Row:
    """Model files and prompts, by a process of their own that needs Steno's environment."""
    command = [sys.executable, str(WORKERS / "prepare.py"), str(folder / "models")]
    command += ["--rows", str(rows), "--tokens", str(tokens)]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=NAMES, help="repeatable; default: all that are installed")
    parser.add_argument(
        "--configuration", default="", metavar="TEXT", help="only configurations whose name contains it"
    )
    parser.add_argument("--rows", type=int, default=8, help="sequences in the batch; default 8")
    parser.add_argument("--tokens", type=int, default=4096, help="of each prompt; default 4096")
    parser.add_argument("--steps", type=int, default=8, help="decode steps to count, after 4 that are not; default 8")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows as JSON lines")
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".peers", metavar="FOLDER", help="default: .peers")
    parser.add_argument(
        "--timeout", type=float, default=900, metavar="SECONDS", help="for each configuration; default 900"
    )
    arguments = parser.parse_args()
    if min(arguments.rows, arguments.tokens - 63, arguments.steps - 1, arguments.threads) < 1:
        parser.error("--rows and --threads must be >= 1, --tokens >= 64, --steps >= 2")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the worker ends too, and the table comes
    prepared = prepare(arguments.peers.resolve(), arguments.rows, arguments.tokens)
    request = prepared | {"steps": arguments.steps, "threads": arguments.threads}
    shape = {"rows": arguments.rows, "prompt_tokens": arguments.tokens, "steps": arguments.steps}
    machine = {"cpu": cpu_name(), "threads": arguments.threads, "date": today()}
    reference = reference_tokens(read_rows(arguments.json), shape)
    rows: list[Row] = []
    peers = find_peers([name for name in NAMES if name in (arguments.only or NAMES)], arguments.peers.resolve())
    interrupted = False
    try:
        for row in bench(peers, request, match=arguments.configuration, timeout_s=arguments.timeout):
            if (row["peer"], row["configuration"]) == REFERENCE and "timeline" in row:
                reference = row["timeline"]["tokens"]
            rows.append(machine | shape | summarize(row, reference))
            append_row(arguments.json, rows[-1])
    except KeyboardInterrupt:
        interrupted = True
        notice("interrupted; what was measured:")
    print(f"{machine['cpu']}, {machine['threads']} threads, {machine['date']}; "
          f"{arguments.rows} rows x {arguments.tokens} tokens, {arguments.steps} steps")  # fmt: skip
    print_table(rows)
    return 130 if interrupted else int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
