"""What the benchmarks share: the machine, medians, files of JSON lines. Needs the standard library alone."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

Row = dict[str, Any]


def cpu_name() -> str:
    """The processor as the system names it, with its generation where a virtual machine leaves the name without a number."""
    pairs = [line.split(":", 1) for line in _lines("/proc/cpuinfo") if ":" in line]
    told = {name.strip(): value.strip() for name, value in reversed(pairs)}
    name = told.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in told and not any(character.isdigit() for character in name):
        name += f" (family {told['cpu family']}, model {told['model']})"
    return name


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def free_bytes() -> int | None:
    """Memory that a new process could take without swapping; None where the system does not tell."""
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    return found[0] if found else None


class OtherLoad:
    """How many cores other processes than this one and its children keep busy, on average since this was made."""

    def __init__(self) -> None:
        self.start = self._now()

    def cores(self) -> float | None:
        """None where the system does not tell."""
        if self.start is None or (now := self._now()) is None:
            return None
        return (now[1] - self.start[1]) / (now[0] - self.start[0])

    def _now(self) -> tuple[float, float] | None:
        """Seconds of wall time, and of cores kept busy by others."""
        lines = _lines("/proc/stat")
        if not lines:
            return None
        user, nice, system, _idle, _wait, irq, softirq = map(int, lines[0].split()[1:8])
        own = os.times()
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - own.user - own.system - own.children_user - own.children_system


def _lines(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines() if Path(path).exists() else []


def prompts(tokenize: Callable[[str], list[int]], rows: int, tokens: int) -> list[list[int]]:
    """Token ids `[rows][tokens]` of the Python language reference, which every machine has, one row after the other."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenize(text[: 8 * rows * tokens])
    if len(ids) < rows * tokens:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than the {rows} x {tokens} asked for.")
    return [ids[row * tokens : (row + 1) * tokens] for row in range(rows)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one value that value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def read_rows(path: Path | None) -> list[Row]:
    """The rows of a file of JSON lines; none where there is no file."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def append_row(path: Path | None, row: Row) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def latest(rows: Iterable[Row], fields: Sequence[str]) -> list[Row]:
    """The last row of those that agree in all `fields`, in the order of the first ones; rows that lack a field are left out."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if all(field in row for field in fields):
            found[tuple(row[field] for field in fields)] = row
    return list(found.values())


def notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
