"""Whether the entries of a store are what their names say, and which chunks nobody can reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steno.codec.cache import read_tokens
from steno.codec.container import SavedFile
from steno.errors import DamagedFile
from steno.store.address import CHUNK
from steno.store.chunks import open_chunk
from steno.store.store import Store


def open_entry(name: str, data: np.ndarray) -> SavedFile:
    """An entry, its header and tokens checked against its name. Raises `DamagedFile` if it is not what that says."""
    if name.endswith(CHUNK):
        return open_chunk(name, data)
    file = SavedFile(Path(name), data)
    if file.header.get("address") != name:
        raise DamagedFile(f"{name} belongs to another address.")
    read_tokens(file)
    return file


def check_entry(store: Store, name: str) -> str | None:
    """What is wrong with an entry, every byte of it read; None if it is whole, or gone meanwhile."""
    try:
        data = store.get(name)
        if data is None:
            return None
        file = open_entry(name, data)
        for group in file.groups:
            file.read_group(group)
    except DamagedFile as error:
        return str(error)
    return None


def describe_entry(store: Store, name: str) -> dict[str, Any]:
    """What the header of an entry says: its model, recipe and tokens; empty if it is damaged or gone."""
    try:
        data = store.get(name)
        if data is None:
            return {}
        file = open_entry(name, data)
    except DamagedFile:
        return {}
    model = file.header.get("model")
    return {
        "model": model.get("name") if isinstance(model, dict) else None,
        "recipe": file.header.get("recipe"),
        "dtype": file.header.get("dtype"),
        "tokens": file.specs[0].num_rows if file.specs else 0,
    }


def unreachable(store: Store) -> list[str]:
    """Chunks whose beginning is gone: no read can come to them until it is read anew."""
    before: dict[str, str] = {}
    for entry in store.entries():
        if not entry.name.endswith(CHUNK):
            continue
        try:
            data = store.get(entry.name)
            if data is None:
                continue
            header = open_chunk(entry.name, data).header
        except DamagedFile:
            continue  # `verify` tells of it
        before[entry.name] = "" if header.get("is_first") is True else header["before"] + CHUNK
    lost: set[str] = set()
    while True:
        more = {name for name, at in before.items() if at and (at not in before or at in lost)} - lost
        if not more:
            return sorted(lost)
        lost |= more
