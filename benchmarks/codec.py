"""Bytes of a real KV cache, losslessly: steno's planes and tables beside zstd and Blosc2 on the same numbers.

Reads the Python language reference with the embedded model and packs the dense cache, layer by layer. Both peers get the
keys and values of a layer as [tokens, channels] and as [channels, tokens], whichever is smaller for them.
Needs `stenokv[bench]`. Seconds are of this process and this machine; bytes are the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics

import blosc2
import numpy as np
import torch
import zstandard

from steno.codec.arrays import ArrayEncoder, ArraySpec
from steno.session import load


def layers(num_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values `[Hkv, S, D]` of each layer, in bfloat16."""
    lm = load()
    tokens = lm.tokenize("\n\n".join(topics.values()), literal=True)[:num_tokens]
    for layer in lm.read_tokens(tokens, "full").cache.own_layers:
        heads = layer.content.decode_row(0, torch.bfloat16)
        yield torch.stack([k for k, _ in heads]), torch.stack([v for _, v in heads])


def steno_bytes(x: torch.Tensor) -> int:
    heads, num_tokens, dim = x.shape
    offsets = tuple(range(0, heads * num_tokens + 1, num_tokens))
    spec = ArraySpec(dtype="bfloat16", columns=dim, offsets=offsets, row_tokens=1)
    encoder = ArrayEncoder(x.reshape(-1, dim), spec)
    chunks = sum(len(encoder.chunk(i)) for i in range(spec.num_chunks))
    return chunks + sum(len(tables.to_bytes()) for tables in encoder.tables)


def layouts(x: torch.Tensor) -> list[np.ndarray]:
    tokens_first = x.transpose(0, 1).flatten(1)
    return [y.contiguous().view(torch.int16).numpy() for y in (tokens_first, tokens_first.T)]


def smallest(pack: Callable[[np.ndarray], bytes]) -> Callable[[torch.Tensor], int]:
    return lambda x: min(len(pack(y)) for y in layouts(x))


def blosc(codec: blosc2.Codec, filters: blosc2.Filter) -> Callable[[torch.Tensor], int]:
    return smallest(lambda y: blosc2.compress2(y, codec=codec, clevel=9, typesize=2, filters=[filters], nthreads=1))


PACKERS: dict[str, Callable[[torch.Tensor], int]] = {
    "raw": lambda x: x.numel() * x.element_size(),
    "steno": steno_bytes,
    "zstd -19": smallest(lambda y: zstandard.ZstdCompressor(level=19).compress(y.tobytes())),
    "blosc2 zstd bitshuffle": blosc(blosc2.Codec.ZSTD, blosc2.Filter.BITSHUFFLE),
    "blosc2 zstd shuffle": blosc(blosc2.Codec.ZSTD, blosc2.Filter.SHUFFLE),
    "blosc2 lz4hc bitshuffle": blosc(blosc2.Codec.LZ4HC, blosc2.Filter.BITSHUFFLE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    arguments = parser.parse_args()
    found = list(layers(arguments.tokens))
    raw = {"keys": 0, "values": 0}
    for name, pack in PACKERS.items():
        started = time.perf_counter()
        sizes = {"keys": sum(pack(k) for k, _ in found), "values": sum(pack(v) for _, v in found)}
        row = {"packer": name, "tokens": arguments.tokens, **{f"{k}_bytes": n for k, n in sizes.items()}}
        row |= {"bytes": sum(sizes.values()), "encode_s": time.perf_counter() - started}
        raw = sizes if name == "raw" else raw
        ratios = [raw["keys"] / sizes["keys"], raw["values"] / sizes["values"]]
        ratios.append(sum(raw.values()) / sum(sizes.values()))
        if arguments.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{name:26} {row['bytes']:>12,} bytes  keys {ratios[0]:.3f}x  values {ratios[1]:.3f}x  both {ratios[2]:.3f}x"
            )


if __name__ == "__main__":
    main()
