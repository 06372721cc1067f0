"""What reading a `.steno` file serves: its tokens and every tensor of the cache, or an error of ours."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import torch

import steno
from steno.cache.accounting import tensors_of
from steno.codec.cache import read_tokens, restore_cache
from steno.codec.container import SavedFile
from steno.codec.identity import how_read, recipe_of
from steno.models.kvcache import KVCache
from tiny import save_with_bytes

TEXT = "The key is under the third stone, says Ms. Q. "
RECIPES = ("snapkv(window=16) | adakv | kivi(bits=4) @ 60%", "full", "int8", "hadamard | int4")
FIXED_BYTES = 8 << 20
"""What a reader may take beside four times the declared size: tables of the decoder, Python's own objects."""


def make_files(folder: Path) -> list[bytes]:
    """Valid files of a tiny model, some tens of kilobytes each."""
    lm = steno.load(save_with_bytes(folder / "llama", "llama"), dtype="fp32")
    found = []
    for i, recipe in enumerate(RECIPES):
        lm.read(TEXT * 4, recipe).save(folder / f"{i}.steno")
        found.append((folder / f"{i}.steno").read_bytes())
    return found


class Reader:
    """Reads files for the tiny model whose configuration it has."""

    def __init__(self, folder: Path) -> None:
        self.files = make_files(folder)
        self.config = steno.load(folder / "llama", dtype="fp32").model.config

    def serve(self, data: bytes) -> tuple[str, int]:
        """A digest of all that the file serves, and the bytes that it declares; raises a `StenoError` if it serves nothing."""
        file = SavedFile(Path("fuzzed.steno"), np.frombuffer(data, np.uint8))
        tokens = read_tokens(file)
        how, recipe = how_read(file, len(tokens)), recipe_of(file)
        cache = KVCache(self.config, recipe)
        restore_cache(file, cache, num_tokens=len(tokens), device=torch.device("cpu"), dtype=torch.float32)
        served = hashlib.sha256(repr((tokens, how, str(recipe), file.header.get("has_question"))).encode())
        for layer in cache.own_layers:
            served.update(repr((layer.seen, layer.row_seen)).encode())
            for x in _tensors(layer.content):
                served.update(repr((x.dtype, x.shape)).encode() + x.contiguous().view(torch.uint8).numpy().tobytes())
        return served.hexdigest(), file.decoded_bytes

    def peak_bytes(self, data: bytes) -> tuple[int, int]:
        """The most that reading the file allocates, and what it may: four times what it declares, and its own size."""
        declared = len(data)
        tracemalloc.start()
        try:
            declared += SavedFile(Path("fuzzed.steno"), np.frombuffer(data, np.uint8)).decoded_bytes
            self.serve(data)
        except steno.StenoError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return peak, 4 * declared + FIXED_BYTES


def _tensors(content: Any) -> list[torch.Tensor]:
    row = content.rows[0]
    return [*tensors_of([row.segments, row.kept]), *content.tail.row(0)]
