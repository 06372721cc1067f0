"""A block of another engine's paged cache: its numbers in all layers, in the engine's own layout, as an entry of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steno.codec.container import FileWriter, SavedFile
from steno.errors import DamagedFile
from steno.store.address import CHUNK, next_address


def block_parts(
    before: bytes, tokens: Sequence[int], layers: Sequence[Tensor], about: Mapping[str, Any]
) -> list[bytes]:
    """The bytes of a block. before: the address before it; layers: `[H, N, C]` of each, N tokens."""
    writer = FileWriter()
    ids = torch.tensor(tokens, dtype=torch.int32)[:, None]
    stored: dict[str, Any] = {"tokens": writer.add(ids, 0, offsets=(0, len(ids)), row_tokens=1), "layers": []}
    for idx, x in enumerate(layers):
        heads, n, columns = x.shape
        offsets = [h * n for h in range(heads + 1)]
        stored["layers"].append(writer.add(x.reshape(-1, columns), idx + 1, offsets=offsets, row_tokens=1))
    return writer.parts(dict(about) | {"before": before.hex(), "block": stored})


def read_block(name: str, data: np.ndarray, *, like: Sequence[Tensor]) -> list[Tensor]:
    """The numbers of every layer of a block, of the shape `[H, N, C]` and dtype of `like`.

    Raises `DamagedFile` if it was changed, lies under another name, or is none of this layout.
    """
    file = SavedFile(Path(name), data)
    try:
        block = file.header["block"]
        ids = file.read_group(0)[block["tokens"]]
        if next_address(bytes.fromhex(file.header["before"]), ids[:, 0].tolist()).hex() + CHUNK != name:
            raise ValueError("its tokens belong to another address")
        if len(block["layers"]) != len(like):
            raise ValueError(f"it has {len(block['layers'])} layers, not {len(like)}")
        found = []
        for idx, (number, wanted) in enumerate(zip(block["layers"], like, strict=True)):
            x = file.read_group(idx + 1)[number]
            if x.dtype != wanted.dtype or x.numel() != wanted.numel() or x.shape[1] != wanted.shape[2]:
                raise ValueError(f"its layer {idx} is {x.dtype} {[*x.shape]}, not {wanted.dtype} {[*wanted.shape]}")
            found.append(x.reshape(wanted.shape))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DamagedFile(f"{name} cannot be read: {str(error)[:300]}.") from None
    return found


def weights_fingerprint(folder: Path) -> str:
    """Identifies the weights in a folder: names and sizes of its files, the headers of safetensors, and 64 samples of each.

    Empty if there are none. It tells checkpoints apart; it does not protect against a deliberate change of single weights.
    """
    import hashlib

    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("config.json")])
    if not any(path.suffix != ".json" for path in files):
        return ""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            for i in range(64):
                file.seek(size * i // 64)
                digest.update(file.read(256))
    return digest.hexdigest()[:32]
