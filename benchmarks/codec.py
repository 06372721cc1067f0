"""A long context as a file: its bytes, what it costs in quality, and how fast it is written, opened and asked.

Reads the Python language reference with the embedded model, saves it at every level and opens it again. Quality is measured
on the text that follows, against the full cache, token by token; and on numbers planted in other texts of the same length.
Bytes are those of the whole file, with its header, bases and tables. Speed is of one thread, in bytes of the dense cache in
bfloat16.
zstd and Blosc2 get the keys and values of a layer as [tokens, channels] and as [channels, tokens], whichever is smaller for them.
LMCache's CacheGen gets the same tensors, in its own environment.
Needs `stenokv[bench]`. Bytes are the same everywhere; seconds are of this process and this machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# transformers looks for a package `kernels` and must not find this folder's kernels.py
sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE]

import blosc2
import torch
import zstandard
from safetensors.torch import load_file, save_file

from steno.cache import row as cache_row
from steno.cache.paged import PagedRows
from steno.cache.segment import DenseSegment
from steno.cache.tail import Tail
from steno.codec.container import SavedFile
from steno.codec.quality import QUALITIES
from steno.context import Context
from steno.session import LanguageModel, load

sys.path.append(str(HERE))
from common import OtherLoad, Row, cpu_name, today
from needle import ANSWER_PREFIX, QUESTION, haystack, sample

CONTINUATION = 256
LINK_BYTES_PER_S = 50e6
PROGRESSIVE = ("q5", 3)
RECIPES = ("fp8", "int8", "int4")


def spoken(ctx: Context, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities `[n, V]` at each token of a text that goes on."""
    return torch.cat([s.logprobs for s in ctx.follow_text(tokens) if s.logprobs is not None])


def drift(full: torch.Tensor, found: torch.Tensor) -> Row:
    kl = (full.exp() * (full - found)).sum(-1)
    return {"kl": float(kl.mean()), "top1_agreement": float((full.argmax(-1) == found.argmax(-1)).float().mean())}


def first_token_s(open_context: Callable[[], Context]) -> tuple[float, Context]:
    """Seconds until the first token of an answer, the opening included."""
    started = time.perf_counter()
    ctx = open_context()
    next(ctx.ask("What is this about?", max_new_tokens=1))
    return time.perf_counter() - started, ctx


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(call: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


class Needles:
    """Texts with a number in each, read once."""

    def __init__(self, lm: LanguageModel, count: int, num_tokens: int, folder: Path) -> None:
        self.lm, self.path, self.texts, self.bytes = lm, folder / "needle.steno", [], 0
        for i in range(count):
            document, key, value = sample(lm, i, count, num_tokens, 0, "noise")
            self.texts.append((lm.read(document), key, value))

    def found(self, quality: str | None) -> int:
        """How many answers have the number; None: of the contexts as they were read."""
        right = 0
        for ctx, key, value in self.texts:
            if quality is not None:
                self.bytes = ctx.save(self.path, quality)
                ctx = self.lm.open(self.path)
            asked = ctx.ask(QUESTION.format(key=key), answer_prefix=ANSWER_PREFIX.format(key=key), max_new_tokens=12)
            right += value in "".join(step.text for step in asked)
        return right


class Bench:
    """One context, and what is measured of a file of it."""

    def __init__(self, lm: LanguageModel, num_tokens: int, repeats: int, folder: Path) -> None:
        tokens = lm.tokenize(haystack("prose"), literal=True)
        self.lm, self.repeats, self.path = lm, repeats, folder / "context.steno"
        self.document, self.after = tokens[:num_tokens], tokens[num_tokens : num_tokens + CONTINUATION]
        self.read_s, self.ctx = first_token_s(lambda: lm.read_tokens(self.document))
        self.full = spoken(self.ctx, self.after)
        # in bfloat16, whatever the dtype of the cache
        self.kv_bytes = self.ctx.report().kv_bytes_full * 2 // lm.model.dtype.itemsize
        self.about = {"tokens": num_tokens, "model": lm.name, "cpu": cpu_name(), "date": today()}

    def level(self, quality: str) -> Row:
        row = {"what": "level", "name": quality} | self.file(lambda: self.ctx.save(self.path, quality))
        return self.about | row

    def needles(self, count: int, levels: list[str]) -> Iterator[Row]:
        """How many planted numbers answers have, from the contexts as they were read and from files of each level."""
        planted = Needles(self.lm, count, len(self.document), self.path.parent)
        for quality in (None, *levels):
            found = {
                "what": "needles",
                "name": quality or "not saved",
                "needles": planted.found(quality),
                "needles_asked": count,
            }
            yield self.about | found | {"bytes": planted.bytes}

    def recipe(self, recipe: str) -> Row:
        """A recipe's own segments, stored without loss."""
        ctx = self.lm.read_tokens(self.document, recipe)
        return self.about | {"what": "recipe", "name": recipe} | self.file(lambda: ctx.save(self.path))

    def file(self, save: Callable[[], int]) -> Row:
        load = OtherLoad()
        with one_thread():
            encode_s = fastest(save, self.repeats)
            decode_s = fastest(lambda: self.lm.open(self.path), self.repeats)
        opened = [first_token_s(lambda: self.lm.open(self.path)) for _ in range(self.repeats)]
        num_bytes = self.path.stat().st_size
        return {
            "bytes": num_bytes,
            "bits_per_value": 16 * num_bytes / self.kv_bytes,
            **drift(self.full, spoken(opened[0][1], self.after)),
            "encode_mb_per_s": self.kv_bytes / encode_s / 1e6,
            "decode_mb_per_s": self.kv_bytes / decode_s / 1e6,
            "first_token_s": min(s for s, _ in opened),
            "read_first_token_s": self.read_s,
            "others_load": load.cores(),
        }

    def over_link(self) -> list[Row]:
        """From the start of a transfer to the first token: from the coarse layer alone, and from the whole file."""
        quality, refinements = PROGRESSIVE
        self.ctx.save(self.path, quality, refinements=refinements)
        layers, there, rows = len(self.ctx.cache.layers), self.path.with_suffix(".part"), []
        file = SavedFile(self.path)
        for count in range(refinements + 1):
            num_bytes = file.bytes_until((count + 1) * layers)
            whole = None if count == refinements else count
            found = []
            for _ in range(self.repeats):
                found.append(first_token_s(lambda n=num_bytes, r=whole: self._transferred(there, n, r)))
            rows.append(
                self.about
                | {
                    "what": "link",
                    "name": f"{quality}, {count} of {refinements} refinements",
                    "bytes": num_bytes,
                    "bits_per_value": 16 * num_bytes / self.kv_bytes,
                    **drift(self.full, spoken(found[0][1], self.after)),
                    "first_token_s": min(s for s, _ in found),
                    "read_first_token_s": self.read_s,
                }
            )
        return rows

    def _transferred(self, there: Path, num_bytes: int, refinements: int | None) -> Context:
        """The context of the first bytes of the file, after they came over the link, piece by piece."""
        started, done = time.perf_counter(), 0
        with self.path.open("rb") as source, there.open("wb") as target:
            while done < num_bytes:
                done += target.write(source.read(min(1 << 18, num_bytes - done)))
                time.sleep(max(0.0, started + done / LINK_BYTES_PER_S - time.perf_counter()))
        return self.lm.open(there, refinements=refinements)

    def packers(self) -> Iterator[Row]:
        """Other packers on the bytes of the dense cache."""
        arrays = []
        for layer in self.ctx.cache.own_layers:
            for side in zip(*layer.content.decode_row(0, torch.bfloat16), strict=True):
                tokens_first = torch.stack(side).transpose(0, 1).flatten(1)
                arrays.append([y.contiguous().view(torch.int16).numpy() for y in (tokens_first, tokens_first.T)])
        for name, pack in PACKERS.items():
            started = time.perf_counter()
            num_bytes = sum(min(len(pack(y)) for y in layouts) for layouts in arrays)
            seconds = (time.perf_counter() - started) / 2  # each layout once
            row = {"what": "packer", "name": name, "bytes": num_bytes, "bits_per_value": 16 * num_bytes / self.kv_bytes}
            yield self.about | row | {"encode_mb_per_s": self.kv_bytes / seconds / 1e6, "kl": 0.0}

    def dense(self) -> torch.Tensor:
        """`[L, 2, T, Hkv, D]`."""
        layers = [layer.content.decode_row(0, torch.bfloat16) for layer in self.ctx.cache.own_layers]
        sides = [[torch.stack(side, 1) for side in zip(*heads, strict=True)] for heads in layers]
        return torch.stack([torch.stack(pair) for pair in sides])

    def holding(self, kv: torch.Tensor) -> Context:
        """A context like ours that holds these keys and values."""
        self.ctx.save(self.path, "q1")
        opened = self.lm.open(self.path)
        for layer, (keys, values) in zip(opened.cache.own_layers, kv.transpose(2, 3), strict=True):
            rows = layer.content
            row = cache_row.Row(segments=[DenseSegment.uniform(keys, values)], prompt_tokens=rows.rows[0].prompt_tokens)
            layer.content = PagedRows([row], Tail.of([(keys[:, :0], values[:, :0])], 64), rows.writer, rows.shared)
        return opened

    def peers(self) -> Iterator[Row]:
        """What comes back from a cast to 8 bits, and from LMCache's CacheGen where its environment is there."""
        kv = self.dense()
        cast = spoken(self.holding(kv.to(torch.float8_e4m3fn).to(kv.dtype)), self.after)
        row = {"what": "peer", "name": "fp8 e4m3, cast", "bytes": kv.numel(), "bits_per_value": 8.0}
        yield self.about | row | drift(self.full, cast)
        python = HERE.parent / ".peers/lmcache/bin/python"
        if not python.exists():
            print("lmcache is not installed (make peers PEERS=lmcache), and left out", file=sys.stderr)
            return
        source, target = self.path.with_name("in.safetensors"), self.path.with_name("out.safetensors")
        save_file({"kv": kv}, source)
        for chunk_tokens in (256, kv.shape[2]):
            command = [python, HERE / "peers/run_lmcache.py", source, target, str(chunk_tokens)]
            told = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            found = spoken(self.holding(load_file(target)["kv"]), self.after)
            yield self.about | {
                "what": "peer",
                "name": f"CacheGen, chunks of {chunk_tokens}",
                "version": told["version"],
                "bytes": told["bytes"],
                "bits_per_value": 16 * told["bytes"] / self.kv_bytes,
                **drift(self.full, found),
                "encode_mb_per_s": self.kv_bytes / told["encode_s"] / 1e6,
                "decode_mb_per_s": self.kv_bytes / told["decode_s"] / 1e6,
            }


def blosc(codec: blosc2.Codec, filters: blosc2.Filter) -> Callable[[Any], bytes]:
    return lambda y: blosc2.compress2(y, codec=codec, clevel=9, typesize=2, filters=[filters], nthreads=1)


PACKERS: dict[str, Callable[[Any], bytes]] = {
    "zstd -19": lambda y: zstandard.ZstdCompressor(level=19).compress(y.tobytes()),
    "blosc2 zstd bitshuffle": blosc(blosc2.Codec.ZSTD, blosc2.Filter.BITSHUFFLE),
    "blosc2 zstd shuffle": blosc(blosc2.Codec.ZSTD, blosc2.Filter.SHUFFLE),
}
COLUMNS = {
    "bits_per_value": ("bits", "7.3f"), "kl": ("KL, nats", "9.5f"), "top1_agreement": ("top-1", "6.3f"),
    "needles": ("needles", "7d"), "encode_mb_per_s": ("enc MB/s", "8.0f"), "decode_mb_per_s": ("dec MB/s", "8.0f"),
    "first_token_s": ("1st token s", "11.3f"), "speedup": ("x faster", "8.1f"),
}  # fmt: skip


def line(row: Row) -> str:
    speed = row["read_first_token_s"] / row["first_token_s"] if "first_token_s" in row else None
    cells = []
    for key, (title, form) in COLUMNS.items():
        value = speed if key == "speedup" else row.get(key)
        width = max(len(title), int(form.split(".")[0].rstrip("d")))
        cells.append((" " * width if value is None else format(value, form)).rjust(width))
    return f"{row['what']:7} {row['name']:26} {row['bytes']:>11,} " + " ".join(cells)


def rows_of(bench: Bench, what: list[str], levels: list[str], num_needles: int) -> Iterator[Row]:
    if "levels" in what:
        yield from map(bench.level, levels)
    if "needles" in what and num_needles:
        yield from bench.needles(num_needles, levels)
    if "recipes" in what:
        yield from map(bench.recipe, RECIPES)
    if "link" in what:
        yield from bench.over_link()
    if "peers" in what:
        yield from bench.peers()
    if "packers" in what:
        yield from bench.packers()


def main() -> None:
    parts = ["levels", "needles", "recipes", "link", "peers", "packers"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--needles", type=int, default=4, help="texts with a planted number (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of every time, of which the least counts")
    parser.add_argument("--only", action="append", choices=parts, help="repeatable; default: all")
    parser.add_argument("--level", action="append", choices=QUALITIES, help="repeatable; default: all")
    parser.add_argument("--json", metavar="FILE", help="append a JSON line for each row")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(load(), arguments.tokens, arguments.repeats, Path(folder))
        titles = " ".join(title.rjust(int(form.split(".")[0].rstrip("d"))) for title, form in COLUMNS.values())
        print(
            f"{arguments.tokens} tokens of the language reference, {bench.lm.name}; read and first token {bench.read_s:.2f} s"
        )
        print(f"{'':34} {'bytes':>11} {titles}")
        levels = arguments.level or list(QUALITIES)
        for row in rows_of(bench, arguments.only or parts, levels, arguments.needles):
            print(line(row), flush=True)
            if arguments.json:
                with open(arguments.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
