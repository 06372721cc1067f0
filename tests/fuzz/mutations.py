"""Ways in which a `.steno` file may be changed: by accident, which digests must find, or by who makes the digests right again."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from steno.codec.container import ALIGNMENT, MAGIC, PREFIX, digest

NUMBERS = [
    0,
    1,
    2,
    -1,
    7,
    63,
    64,
    255,
    256,
    257,
    65535,
    1 << 20,
    1 << 31,
    (1 << 31) - 1,
    1 << 47,
    1 << 48,
    1 << 63,
    1 << 200,
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0.5,
    1e308,
    "",
    "x",
    "full",
    "uint8",
    "int32",
    "dense",
    "pages",
    [],
    {},
    [[]],
    [0, 0],
    *NUMBERS,
]

Mutation = Callable[[random.Random, bytes, bytes], bytes]
"""From a file, and another valid one, to a changed one."""


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a valid file and what follows it."""
    length = PREFIX.unpack(data[: PREFIX.size])[3]
    body = -(-(PREFIX.size + length) // ALIGNMENT) * ALIGNMENT
    return json.loads(data[PREFIX.size : PREFIX.size + length]), data[body:]


def signed(header: Any, body: bytes, version: int = 1) -> bytes:
    """A file of this header, its digest right."""
    text = json.dumps(header, separators=(",", ":")).encode()
    start = PREFIX.pack(MAGIC, version, 0, len(text), b"")[:24]
    front = start + bytes.fromhex(digest(start, text)) + text
    return front + bytes(-len(front) % ALIGNMENT) + body


# by accident


def bytes_changed(rng: random.Random, data: bytes, other: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 30])):
        found[rng.randrange(len(found))] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(found)


def bit_flipped(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.choice([rng.randrange(len(data)), rng.randrange(80)])]


def longer(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data + rng.choice([bytes(rng.randrange(1, 200)), rng.randbytes(rng.randrange(1, 200)), data])


def part_gone(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice([1, 2, 8, 64, 1000]) :]


def part_inserted(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, more = rng.randrange(len(data)), rng.randrange(1, 100)
    return data[:at] + rng.choice([bytes(more), rng.randbytes(more), data[at : at + more]]) + data[at:]


def length_changed(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, size = rng.choice([(8, 4), (12, 4), (16, 8)])
    value = rng.choice([*NUMBERS, rng.getrandbits(64)]) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def chunks_moved(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The bytes of a chunk over those of another, or both in each other's place."""
    header, body = split(data)
    start = len(data) - len(body)
    (_, _, a, size_a, _), (_, _, b, size_b, _) = rng.choices(header["chunks"], k=2)
    size, found = min(size_a, size_b), bytearray(data)
    found[start + a : start + a + size] = data[start + b : start + b + size]
    if rng.random() < 0.5:
        found[start + b : start + b + size] = data[start + a : start + a + size]
    return bytes(found)


def spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(min(len(data), len(other)))
    return rng.choice([data[:at] + other[at:], data[: len(data) - len(split(data)[1])] + split(other)[1]])


ACCIDENTS: Sequence[Mutation] = (
    bytes_changed, bit_flipped, cut, longer, part_gone, part_inserted, length_changed, chunks_moved, spliced,
)  # fmt: skip


# with intent: digests are made right again


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in [(*path, key), *_nodes(value[key], (*path, key))]]


def header_changed(rng: random.Random, data: bytes, other: bytes) -> bytes:
    header, body = split(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        nodes = _nodes(header)
        if not nodes:
            break
        path = rng.choice(nodes)
        parent = header
        for key in path[:-1]:
            parent = parent[key]
        _change(rng, parent, path[-1])
    return signed(header, body)


def _change(rng: random.Random, parent: Any, key: Any) -> None:
    kind = rng.random()
    if kind < 0.15:
        del parent[key]
    elif kind < 0.3 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(rng.choice(parent)))
    elif kind < 0.4 and isinstance(parent, list):
        parent[key] = copy.deepcopy(rng.choice(parent))
    elif kind < 0.6 and type(parent[key]) is int:
        parent[key] += rng.choice([1, -1, 64, -64, 256])
    elif kind < 0.65:
        deep: Any = 0
        for _ in range(rng.choice([3, 100])):
            deep = [deep]
        parent[key] = deep
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))


def chunk_changed(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Bytes of the tables or of a chunk, which the decoder then sees."""
    header, body = split(data)
    entry = rng.choice([header["tables"], *header["chunks"]])
    offset, length = entry[-3], entry[-2]
    if not length:
        return signed(header, body)
    part = bytearray(body[offset : offset + length])
    for _ in range(rng.choice([1, 2, 10])):
        part[rng.randrange(length)] = rng.choice([0, 1, 255, rng.randrange(256)])
    entry[-1] = digest(bytes(part))
    return signed(header, body[:offset] + bytes(part) + body[offset + length :])


def chunks_renamed(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Entries of the index of chunks twice, in another order, or in each other's place with their bytes."""
    header, body = split(data)
    chunks = header["chunks"]
    a, b = rng.randrange(len(chunks)), rng.randrange(len(chunks))
    kind = rng.randrange(3)
    if kind == 0:
        chunks[a][2:], chunks[b][2:] = chunks[b][2:], chunks[a][2:]
    elif kind == 1:
        chunks[a], chunks[b] = chunks[b], chunks[a]
    else:
        chunks.insert(a, list(chunks[b]))
    return signed(header, body)


def parts_of_two(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A header with fields of another file's."""
    header, body = split(data)
    field = rng.choice([*header])
    header[field] = split(other)[0][field]
    return signed(header, rng.choice([body, split(other)[1]]))


INTENT: Sequence[Mutation] = (header_changed, header_changed, chunk_changed, chunks_renamed, parts_of_two)
