"""One chunk: 256 tokens and their keys and values in all layers, dense, in the format of docs/format.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steno.codec.arrays import CHUNK_TOKENS
from steno.codec.container import FileWriter, SavedFile
from steno.errors import DamagedFile
from steno.store.address import CHUNK, next_address

HeadKV = tuple[Tensor, Tensor]
"""Keys and values `[Hkv, n, D]`."""


def chunk_parts(
    before: bytes, tokens: Sequence[int], layers: Sequence[HeadKV], about: Mapping[str, Any], *, is_first: bool
) -> list[bytes]:
    """The bytes of a chunk. before: the address before it; layers: keys and values `[Hkv, 256, D]` of each; about: the model."""
    writer = FileWriter()
    ids = torch.tensor(tokens, dtype=torch.int32)[:, None]
    stored: dict[str, Any] = {"tokens": writer.add(ids, 0, offsets=(0, len(ids)), row_tokens=1), "layers": []}
    for idx, pair in enumerate(layers):
        num_heads, n, dim = pair[0].shape
        offsets = [h * n for h in range(num_heads + 1)]
        arrays = [writer.add(x.reshape(-1, dim), idx + 1, offsets=offsets, row_tokens=1) for x in pair]
        stored["layers"].append(arrays)
    place = {"before": before.hex(), "is_first": is_first}
    return writer.parts(dict(about) | {"recipe": "full", "level": "lossless", "chunk": stored} | place)


def read_chunk(
    name: str, data: np.ndarray, *, dtype: torch.dtype, num_layers: int, shape: Sequence[int]
) -> list[HeadKV]:
    """Keys and values `[Hkv, 256, D]` of every layer of a chunk of this name.

    Raises `DamagedFile` if it is none, or was changed, or its numbers are not of `dtype` and `shape`.
    """
    file, layers = open_chunk(name, data), []
    try:
        entries = file.header["chunk"]["layers"]
        if len(entries) != num_layers:
            raise ValueError(f"it has {len(entries)} layers and the model {num_layers}")
        for idx, entry in enumerate(entries):
            group = file.read_group(idx + 1)
            keys, values = (group[number] for number in entry)
            for x in (keys, values):
                if x.dtype != dtype or tuple(x.shape) != (shape[0] * shape[1], shape[2]):
                    raise ValueError(f"its layer {idx} is {x.dtype} {[*x.shape]}, not {dtype} {[*shape]}")
            layers.append((keys.reshape(*shape), values.reshape(*shape)))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{name} cannot be read: {str(error)[:300]}.") from None
    return layers


def open_chunk(name: str, data: np.ndarray) -> SavedFile:
    """A chunk whose tokens are those of its name; the numbers are not read yet. Raises `DamagedFile` if it is none."""
    file = SavedFile(Path(name), data)
    try:
        ids = file.read_group(0)[file.header["chunk"]["tokens"]]
        if tuple(ids.shape) != (CHUNK_TOKENS, 1) or ids.dtype != torch.int32:
            raise ValueError(f"it has tokens {ids.dtype} {[*ids.shape]}")
        if next_address(bytes.fromhex(file.header["before"]), ids[:, 0].tolist()).hex() + CHUNK != name:
            raise ValueError("its tokens belong to another address")
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{name} cannot be read: {str(error)[:300]}.") from None
    return file
