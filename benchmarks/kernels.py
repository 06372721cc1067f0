"""Time one decode step of attention over a long context: torch SDPA against steno's native kernel in every format.

Every contender reads several copies of its cache in turn, together larger than `--footprint-mib`, so a repeat finds
its cache in DRAM and not in the processor's caches, as a step of a model with many layers would. Contenders take turns
within a repeat, so a machine that slows down slows all of them. Only the attention call is timed: SDPA gets keys and
values ready in its own layout.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from steno.kernels.attention import DenseSpan, PageSpan, SpanTable, attend
from steno.kernels.quant import Pages, encode_pages
from steno.types import PAGE_TOKENS, PageFormat

Step = Callable[[], object]

FORMATS = {
    "int8": PageFormat(bits=8),
    "int4": PageFormat(bits=4),
    "int4 g32": PageFormat(bits=4, key_group=32, value_group=32),
    "int2": PageFormat(bits=2),
    "int2 g32": PageFormat(bits=2, key_group=32, value_group=32),
}


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    contenders = {**sdpa_contenders(args), **steno_contenders(args)}
    seconds = measure({name: steps for name, (_, steps) in contenders.items()}, args.repeats)
    bandwidth = read_bandwidth(args)
    baseline = min(statistics.median(seconds[name]) for name in seconds if name.startswith("sdpa bf16"))
    rows = []
    for name, (num_bytes, _) in contenders.items():
        median = statistics.median(seconds[name])
        quarter = statistics.quantiles(seconds[name], n=4)
        rows.append(
            {
                "name": name,
                "kv_bytes": num_bytes,
                "median_ms": median * 1e3,
                "quartile_low_ms": quarter[0] * 1e3,
                "quartile_high_ms": quarter[2] * 1e3,
                "speedup": baseline / median,
                "gb_per_s": num_bytes / median / 1e9,
                "bandwidth_share": num_bytes / median / bandwidth,
            }
        )
    print_table(rows, args, bandwidth)
    if args.json:
        about = {"cpu": cpu_name(), "date": today(), "torch": torch.__version__, "read_bytes_per_s": bandwidth}
        options = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({**about, **options, "rows": rows}, indent=1))


def parse_args() -> argparse.Namespace:
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=defaults)
    parser.add_argument("--rows", type=int, default=8, help="sequences in the batch")
    parser.add_argument("--tokens", type=int, default=4096, help="cached tokens of each, a multiple of 64")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--group", type=int, default=3, help="query heads per KV head")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--isa", choices=["vnni", "avx512", "avx2", "portable"], help="instruction set; the best one if not given"
    )
    parser.add_argument("--footprint-mib", type=int, default=256, help="bytes that each contender cycles through")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.tokens % PAGE_TOKENS:
        parser.error(f"--tokens must be a multiple of {PAGE_TOKENS}")
    return args


def random_kv(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (args.rows, args.kv_heads, args.tokens, args.head_dim)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def num_copies(args: argparse.Namespace, num_bytes: int) -> int:
    return max(2, -(-args.footprint_mib * 2**20 // num_bytes))


def sdpa_contenders(args: argparse.Namespace) -> dict[str, tuple[int, list[Step]]]:
    """Three ways to give SDPA grouped queries: its own, repeated keys, the group as query tokens (it needs no mask)."""
    found: dict[str, tuple[int, list[Step]]] = {}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        k, v = random_kv(args, dtype)
        num_bytes = k.nbytes + v.nbytes
        copies = [(k.clone(), v.clone()) for _ in range(num_copies(args, num_bytes))]
        q = torch.randn(args.rows, args.kv_heads * args.group, 1, args.head_dim, dtype=dtype)
        grouped = q.reshape(args.rows, args.kv_heads, args.group, args.head_dim)
        ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "gqa": lambda k, v, q=q: scaled_dot_product_attention(q, k, v, enable_gqa=True),
            "repeat": lambda k, v, q=q: scaled_dot_product_attention(
                q, k.repeat_interleave(args.group, 1), v.repeat_interleave(args.group, 1)
            ),
            "group as tokens": lambda k, v, q=grouped: scaled_dot_product_attention(q, k, v),
        }
        for way, call in ways.items():
            found[f"sdpa {label}, {way}"] = num_bytes, [lambda k=k, v=v, call=call: call(k, v) for k, v in copies]
    return found


def steno_contenders(args: argparse.Namespace) -> dict[str, tuple[int, list[Step]]]:
    found: dict[str, tuple[int, list[Step]]] = {}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        k, v = random_kv(args, dtype)
        tables = []
        for _ in range(num_copies(args, k.nbytes + v.nbytes)):
            copy_k, copy_v = k.clone(), v.clone()
            heads = range(args.kv_heads)
            rows = [[[DenseSpan(copy_k[b, h], copy_v[b, h])] for h in heads] for b in range(args.rows)]
            tables.append(SpanTable.build(rows, head_dim=args.head_dim))
        found[f"steno {label}"] = k.nbytes + v.nbytes, steps(args, tables)
    k, v = (x.reshape(-1, PAGE_TOKENS, args.head_dim) for x in random_kv(args, torch.bfloat16))
    for label, fmt in FORMATS.items():
        pages = encode_pages(k, v, fmt)
        tables = [page_table(args, pages) for _ in range(num_copies(args, pages.nbytes))]
        found[f"steno {label}"] = pages.nbytes, steps(args, tables)
    return found


def page_table(args: argparse.Namespace, pages: Pages) -> SpanTable:
    """A table over a copy of `pages`, which hold the heads one after the other."""
    codes = {name: getattr(pages, name).clone() for name in ("key_codes", "value_codes", "key_params", "value_params")}
    copy = Pages(fmt=pages.fmt, head_dim=pages.head_dim, **codes)
    per_head = args.tokens // PAGE_TOKENS
    spans = [PageSpan(copy[i : i + per_head]) for i in range(0, copy.num_pages, per_head)]
    rows = [[[spans[b * args.kv_heads + h]] for h in range(args.kv_heads)] for b in range(args.rows)]
    return SpanTable.build(rows, head_dim=args.head_dim)


def steps(args: argparse.Namespace, tables: list[SpanTable]) -> list[Step]:
    q = torch.randn(args.rows, args.kv_heads * args.group, 1, args.head_dim, dtype=torch.bfloat16)
    scale = args.head_dim**-0.5
    return [lambda t=t: attend(q, t, scale=scale, impl="cpu", isa=args.isa, num_threads=args.threads) for t in tables]


def measure(contenders: dict[str, list[Step]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, copies in contenders.items():
            step = copies[repeat % len(copies)]
            start = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def read_bandwidth(args: argparse.Namespace) -> float:
    """Bytes per second of the faster of two plain reads in torch, a sum and a dot product, over the footprint."""
    x, y = torch.ones(2, args.footprint_mib * 2**17).unbind()  # fp32, the footprint together
    best = 0.0
    for call, num_bytes in ((x.sum, x.nbytes), (lambda: torch.dot(x, y), x.nbytes + y.nbytes)):
        for _ in range(6):
            start = time.perf_counter()
            call()
            best = max(best, num_bytes / (time.perf_counter() - start))
    return best


def print_table(rows: list[dict], args: argparse.Namespace, bandwidth: float) -> None:
    print(f"{cpu_name()}, {args.threads} thread(s), torch {torch.__version__}, {today()}")
    print(
        f"decode, {args.rows} rows x {args.tokens} tokens, {args.kv_heads} KV heads x {args.group} query heads, "
        f"head_dim {args.head_dim}; plain reads reach {bandwidth / 1e9:.1f} GB/s; median of {args.repeats}"
    )
    print(f"{'':28}{'KV MB':>8}{'ms':>9}{'quartiles':>17}{'vs SDPA bf16':>14}{'GB/s':>7}{'of reads':>10}")
    for row in rows:
        spread = f"{row['quartile_low_ms']:.2f} - {row['quartile_high_ms']:.2f}"
        print(
            f"{row['name']:28}{row['kv_bytes'] / 1e6:8.1f}{row['median_ms']:9.2f}{spread:>17}"
            f"{row['speedup']:13.2f}x{row['gb_per_s']:7.1f}{row['bandwidth_share']:10.0%}"
        )


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


if __name__ == "__main__":
    main()
