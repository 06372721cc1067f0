"""Time attention over a long context: torch SDPA against steno's kernels in every format.

Cases: `batch` (one new token for each row of a batch), `queries` (few new tokens a row, as in speculative decoding or a
short turn), `long` (one row of twice the context, on one thread and on two), `shared` (all rows share one prefix, against
rows that hold it each). Every contender reads several copies of its cache in turn, together larger than `--footprint-mib`,
so a repeat finds its cache in DRAM and not in the processor's caches, as a step of a model with many layers would.
Contenders and the plain reads that bandwidth is told from take turns within a repeat, so a machine that slows down slows
all of them. Only the attention call is timed:
SDPA gets keys and values ready in its own layout.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
# transformers looks for a package `kernels` and must not find this folder's kernels.py
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

import torch
from benchmarks.attention_contenders import GQA, Case, Heads, Step
from benchmarks.common import Row, append_row, cpu_name, quartiles, today

from steno.kernels.native import available_isas
from steno.types import PAGE_TOKENS


class Bench:
    """Measures cases on one device."""

    def __init__(self, heads: Heads) -> None:
        self.heads, self.device = heads, heads.device
        self.wake = torch.ones(2**20)
        self.numbers = torch.ones(2, heads.footprint // 8, device=heads.device).unbind()  # fp32, the footprint together

    def seconds(self, step: Step) -> float:
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    def read_bandwidths(self) -> tuple[float, float]:
        """Bytes per second of two plain reads in torch over the footprint, a sum and a dot product."""
        x, y = self.numbers
        return x.nbytes / self.seconds(x.sum), (x.nbytes + y.nbytes) / self.seconds(lambda: torch.dot(x, y))

    def measure(self, case: Case, repeats: int) -> Iterator[Row]:
        """One row for each contender and number of threads; the first round only warms up."""
        contenders = list(self.heads.contenders(case))
        seconds: dict[tuple[int, int], list[float]] = {}
        reads: dict[int, list[tuple[float, float]]] = {threads: [] for threads in case.threads}
        free_cores: dict[int, list[float]] = {threads: [] for threads in case.threads}
        if self.device == "cuda":  # each copy of a table makes its plan in its first call
            for step in (step for contender in contenders for step in contender.copies):
                step()
        for repeat in range(repeats + 1):
            for threads in case.threads:
                torch.set_num_threads(threads)
                self.wake.sum()
                for i, contender in enumerate(contenders):
                    took = self.seconds(contender.copies[repeat % len(contender.copies)])
                    if repeat:
                        seconds.setdefault((i, threads), []).append(took)
                if threads > 1:
                    free_cores[threads].append(compute_speedup(threads))
                reads[threads].append(self.read_bandwidths())
        # a median like the times beside it, of the faster kind of read
        bandwidth = {n: max(quartiles(kind)[1] for kind in zip(*found[1:], strict=True)) for n, found in reads.items()}
        for (i, threads), took in seconds.items():
            low, median, high = quartiles(took)
            contender = contenders[i]
            one = seconds.get((i, 1))
            yield {
                "contender": contender.name, "shared": contender.shared, "threads": threads, "repeats": repeats,
                "kv_bytes": contender.kv_bytes, "median_s": median, "low_s": low, "high_s": high,
                "bytes_per_s": contender.kv_bytes / median, "read_bytes_per_s": bandwidth[threads],
                "bandwidth_share": contender.kv_bytes / median / bandwidth[threads],
                "threads_speedup": quartiles(one)[1] / median if one and threads > 1 else None,
                "compute_speedup": quartiles(free_cores[threads])[1] if threads > 1 else None,
            }  # fmt: skip


def compute_speedup(threads: int) -> float:
    """What so many threads compute in the time of one, in a loop that needs no memory: `threads` if all cores are free."""
    data = bytes(2**20)

    def work() -> None:
        for _ in range(8):
            hashlib.sha256(data)  # leaves the interpreter's lock to the others

    def timed(count: int) -> float:
        workers = [threading.Thread(target=work) for _ in range(count)]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - started

    timed(threads)  # wakes the cores
    return threads * timed(1) / timed(threads)


def against_sdpa(rows: list[Row]) -> None:
    """Adds the speedup over SDPA bf16 of the same threads and sharing, in its fastest form and with `enable_gqa`."""
    for row in rows:
        peers = [r for r in rows if (r["threads"], r["shared"]) == (row["threads"], row["shared"])]
        times = {r["contender"]: r["median_s"] for r in peers if r["contender"].startswith("sdpa bf16")}
        row["speedup_fastest"] = min(times.values()) / row["median_s"]
        row["speedup_gqa"] = times[GQA] / row["median_s"]
        apart = [r for r in rows if not r["shared"] and r["contender"] == row["contender"]]
        row["shared_speedup"] = apart[0]["median_s"] / row["median_s"] if row["shared"] else None


def print_rows(case: Case, rows: list[Row]) -> None:
    print(f"\n{case}; plain reads {max(row['read_bytes_per_s'] for row in rows) / 1e9:.1f} GB/s")
    print(f"{'':36}{'threads':>8}{'KV MB':>8}{'ms':>9}{'quartiles':>18}{'vs SDPA':>9}{'vs gqa':>8}{'of reads':>10}")
    for row in rows:
        name = row["contender"] + (" shared" if row["shared"] else "")
        spread = f"{row['low_s'] * 1e3:.2f} - {row['high_s'] * 1e3:.2f}"
        print(
            f"{name:36}{row['threads']:8}{row['kv_bytes'] / 1e6:8.1f}{row['median_s'] * 1e3:9.2f}{spread:>18}"
            f"{row['speedup_fastest']:8.2f}x{row['speedup_gqa']:7.1f}x{row['bandwidth_share']:10.0%}"
        )
    for threads in {row["threads"] for row in rows if row["compute_speedup"]}:
        found = next(row["compute_speedup"] for row in rows if row["threads"] == threads)
        print(f"{threads} threads computed {found:.2f} times as much as one meanwhile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=["batch", "queries", "long", "shared"], help="repeatable")
    parser.add_argument("--rows", type=int, default=8, help="sequences in the batch; default 8")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="cached tokens of each, a multiple of 64; default 4096"
    )
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--group", type=int, default=3, help="query heads per KV head; default 3")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15, help="default 15")
    parser.add_argument("--isa", choices=available_isas(), help="instruction set; the best one if not given")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--footprint-mib", type=int, default=256, help="bytes that each contender cycles through")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows as JSON lines")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the rows measured now; needs matplotlib")
    args = parser.parse_args()
    if args.tokens % PAGE_TOKENS or args.repeats < 2:
        parser.error(f"--tokens must be a multiple of {PAGE_TOKENS}, --repeats at least 2")
    torch.manual_seed(0)
    heads = Heads(kv_heads=args.kv_heads, group=args.group, head_dim=args.head_dim, device=args.device, isa=args.isa,
                  footprint=args.footprint_mib * 2**20)  # fmt: skip
    on_cuda = args.device == "cuda"
    machine = {
        "cpu": cpu_name(), "gpu": torch.cuda.get_device_name() if on_cuda else None, "date": today(),
        "torch": torch.__version__, "isa": None if on_cuda else args.isa or available_isas()[-1],
    }  # fmt: skip
    print(", ".join(str(value) for value in machine.values() if value), f"; medians of {args.repeats}", sep="")
    shape = {"rows": args.rows, "tokens": args.tokens}
    cases = [
        Case(name="batch", **shape),
        *(Case(name="queries", queries=queries, **shape) for queries in (1, 4, 8, 16, 64)),
        Case(name="long", rows=1, tokens=2 * args.tokens, threads=(1,) if on_cuda else (1, 2)),
        Case(name="shared", prefix_shared=(False, True), **shape),
    ]
    drawn: list[Row] = []
    for case in (case for case in cases if case.name in (args.case or {c.name for c in cases})):
        rows = list(Bench(heads).measure(case, args.repeats))
        against_sdpa(rows)
        print_rows(case, rows)
        about = {"case": case.name, "rows": case.rows, "tokens": case.tokens, "queries": case.queries}
        shape = {"kv_heads": args.kv_heads, "group": args.group, "head_dim": args.head_dim}
        for row in rows:
            drawn.append(machine | about | shape | row)
            append_row(args.json, drawn[-1])
    if args.picture:
        from benchmarks.pictures import draw_kernels

        draw_kernels(drawn, args.picture)


if __name__ == "__main__":
    main()
