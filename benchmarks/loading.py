"""Loading a context over a link that changes: the controller of `steno.store.loading` against fixed policies, simulated.

    python benchmarks/loading.py                                  # synthetic links
    python benchmarks/loading.py --trace home.trace --deadline 2  # a recorded one
    python benchmarks/loading.py --record http://host/large.bin --out home.trace

A trace is a text file, a line for each stretch of time: seconds and bytes per second, separated by a space; `#` begins a comment.
It is repeated when it ends. Simulated is the link alone: sizes and speeds are arguments, and printed.
Time is simulated too, so the result does not depend on this machine. Fetching a chunk overlaps decoding the one before;
text is read when everything before it is there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from steno.store.loading import RECOMPUTE, LoadableChunk, LoadController

VALUES_PER_TOKEN = 2 * 30 * 3 * 64
"""Of the embedded model: keys and values, layers, KV heads, dimensions."""

LEVEL_BITS = (10.6, 6.0, 4.5, 3.2, 2.2)
"""Bits per value of each level. The first is what lossless chunks of the embedded model have; the others are assumed."""

READ_TOK_PER_S, DECODE_TOK_PER_S = 400.0, 6000.0
"""Assumed: about what two cores of a server read, and what one decodes."""

Policy = Callable[[int, float], int]
"""From a chunk and the time that has passed to a level or `RECOMPUTE`."""


@dataclass(frozen=True)
class Trace:
    """A link whose speed changes: stretches of (seconds, bytes per second), repeated without end."""

    stretches: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.stretches or any(s <= 0 or rate < 0 for s, rate in self.stretches):
            raise ValueError("a trace needs stretches of seconds > 0 and bytes per second >= 0")
        if not any(rate for _, rate in self.stretches):
            raise ValueError("a trace needs some stretch in which bytes come")

    @classmethod
    def read(cls, path: Path) -> Trace:
        lines = [line.split("#")[0].split() for line in path.read_text("utf-8").splitlines()]
        return cls(tuple((float(seconds), float(rate)) for seconds, rate in filter(None, lines)))

    def write(self, path: Path) -> None:
        lines = [f"{seconds:.6f} {rate:.0f}" for seconds, rate in self.stretches]
        path.write_text("\n".join(["# seconds, bytes per second", *lines, ""]), "utf-8")

    def arrival(self, start_s: float, num_bytes: float) -> float:
        """When the last of so many bytes, asked for at `start_s`, has come."""
        period = sum(seconds for seconds, _ in self.stretches)
        per_period = sum(seconds * rate for seconds, rate in self.stretches)
        now, left = start_s, float(num_bytes)
        if left > 2 * per_period:
            whole = int(left / per_period) - 1
            now, left = now + whole * period, left - whole * per_period
        at = now % period
        while True:
            for seconds, rate in self.stretches:
                if at >= seconds:
                    at -= seconds
                    continue
                room = seconds - at
                if left <= room * rate:
                    return now + (left / rate if rate else 0.0)
                now, left, at = now + room, left - room * rate, 0.0


@dataclass(frozen=True)
class Outcome:
    """What a policy came to: when all was loaded, and how each chunk was."""

    seconds: float
    ways: tuple[int, ...]


def simulate(
    chunks: Sequence[LoadableChunk],
    trace: Trace,
    policy: Policy,
    *,
    start_s: float = 0.0,
    read_tok_per_s: float = READ_TOK_PER_S,
    decode_tok_per_s: float = DECODE_TOK_PER_S,
    controller: LoadController | None = None,
) -> Outcome:
    """Loads all chunks over a link in simulated time. controller: told of what is measured, where the policy is one."""
    now, decoded, ways = 0.0, 0.0, []
    for idx, chunk in enumerate(chunks):
        way = policy(idx, now)
        ways.append(way)
        if way == RECOMPUTE:
            begun = max(now, decoded)
            seconds = chunk.num_tokens / read_tok_per_s
            now = decoded = begun + seconds
            if controller is not None:
                controller.recomputed(chunk.num_tokens, seconds)
            continue
        num_bytes = chunk.level_bytes[way]
        arrival = trace.arrival(start_s + now, num_bytes) - start_s
        if controller is not None:
            controller.fetched(num_bytes, arrival - now)
        now, decoded = arrival, max(arrival, decoded) + chunk.num_tokens / decode_tok_per_s
    return Outcome(max(now, decoded), tuple(ways))


def synthetic(seed: int) -> dict[str, Trace]:
    """Links of several kinds; 1 MB/s to 1 GB/s."""
    rng = random.Random(seed)
    walk, rate = [], 40e6
    for _ in range(200):
        rate = min(400e6, max(2e6, rate * rng.lognormvariate(0, 0.5)))
        walk.append((0.1, rate))
    return {
        "steady 1 GB/s": Trace(((1.0, 1e9),)),
        "steady 50 MB/s": Trace(((1.0, 50e6),)),
        "steady 10 MB/s": Trace(((1.0, 10e6),)),
        "steady 1 MB/s": Trace(((1.0, 1e6),)),
        "drops from 100 to 5 MB/s": Trace(((0.3 + rng.random(), 100e6), (5.0, 5e6))),
        "rises from 5 to 100 MB/s": Trace(((0.3 + rng.random(), 5e6), (5.0, 100e6))),
        "wanders, 2 to 400 MB/s": Trace(tuple(walk)),
        "any of 1 to 100 MB/s, each 0.2 s": Trace(tuple((0.2, 10 ** rng.uniform(6, 8)) for _ in range(100))),
    }


def policies(num_levels: int) -> dict[str, int | None]:
    """The controller (None), text alone, and each level alone."""
    return {"controller": None, "text": RECOMPUTE} | {f"level {i}": i for i in range(num_levels)}


def compare(arguments: argparse.Namespace) -> list[dict[str, object]]:
    bits = arguments.level_bits
    sizes = tuple(int(256 * arguments.values_per_token * b / 8) for b in bits)
    chunks = [LoadableChunk(num_tokens=256, level_bytes=sizes)] * -(-arguments.tokens // 256)
    speeds = {"read_tok_per_s": arguments.read_tok_per_s, "decode_tok_per_s": arguments.decode_tok_per_s}
    traces = [synthetic(seed) for seed in range(arguments.runs)]
    if arguments.trace:
        traces = [{str(arguments.trace): Trace.read(arguments.trace)}] * arguments.runs
    rows: list[dict[str, object]] = []
    for name in traces[0]:
        for label, fixed in policies(len(bits)).items():
            found = []
            for run in range(arguments.runs):
                start_s = random.Random(run).random() * 10
                controller = LoadController(chunks, deadline_s=arguments.deadline, **speeds)
                policy = controller.choose if fixed is None else (lambda idx, elapsed, way=fixed: way)
                found.append(
                    simulate(chunks, traces[run][name], policy, start_s=start_s, controller=controller, **speeds)
                )
            held = [bits[0 if way == RECOMPUTE else way] for outcome in found for way in outcome.ways]
            rows.append({
                "link": name,
                "policy": label,
                "missed": sum(outcome.seconds > arguments.deadline for outcome in found) / len(found),
                "seconds": statistics.mean(outcome.seconds for outcome in found),
                "bits_per_value": statistics.mean(held),
                "recomputed": statistics.mean(way == RECOMPUTE for outcome in found for way in outcome.ways),
            })  # fmt: skip
    return rows


def record(url: str, out: Path, *, block_bytes: int = 1 << 18, limit_s: float = 60.0) -> None:
    """Fetches a file and writes how fast its bytes came."""
    import fsspec

    stretches, started = [], time.perf_counter()
    with fsspec.open(url, "rb", block_size=0) as file:
        while (begun := time.perf_counter()) - started < limit_s:
            data = file.read(block_bytes)
            if not data:
                break
            seconds = max(time.perf_counter() - begun, 1e-6)
            stretches.append((seconds, len(data) / seconds))
    Trace(tuple(stretches)).write(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument(
        "--deadline", type=float, default=2.0, help="seconds until all is loaded (default: %(default)s)"
    )
    parser.add_argument(
        "--level-bits", type=float, nargs="+", default=LEVEL_BITS, help="bits per value, the best first"
    )
    parser.add_argument("--values-per-token", type=int, default=VALUES_PER_TOKEN)
    parser.add_argument("--read-tok-per-s", type=float, default=READ_TOK_PER_S)
    parser.add_argument("--decode-tok-per-s", type=float, default=DECODE_TOK_PER_S)
    parser.add_argument("--runs", type=int, default=50, help="of each link, begun at another moment")
    parser.add_argument("--trace", type=Path, help="a recorded link in place of the synthetic ones")
    parser.add_argument("--record", metavar="URL", help="record a link: fetch this and write --out")
    parser.add_argument("--out", type=Path, help="where the recorded trace goes")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    arguments = parser.parse_args()
    if arguments.record:
        if arguments.out is None:
            parser.error("--record needs --out")
        record(arguments.record, arguments.out)
        return
    rows = compare(arguments)
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
        return
    print(
        f"{arguments.tokens} tokens within {arguments.deadline} s; levels of {', '.join(map(str, arguments.level_bits))} bits "
        f"per value; text at {arguments.read_tok_per_s:.0f} tokens/s, decoding at {arguments.decode_tok_per_s:.0f}; simulated"
    )
    print(f"{'link':34}{'policy':12}{'missed':>8}{'seconds':>9}{'bits':>7}{'text':>7}")
    for row in rows:
        print(
            f"{row['link']:34}{row['policy']:12}{row['missed']:8.0%}{row['seconds']:9.2f}{row['bits_per_value']:7.2f}"
            f"{row['recomputed']:7.0%}"
        )


if __name__ == "__main__":
    main()
