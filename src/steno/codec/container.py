"""The file: magic, version, a JSON header, tables, chunks; each part with a digest, every length checked. docs/format.md."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

from steno.codec.arrays import ArrayDecoder, ArrayEncoder, ArraySpec, Choice
from steno.codec.planes import DTYPES, dtype_name, num_planes
from steno.codec.tables import RAW, Tables
from steno.codec.whole import write_whole
from steno.errors import BadArgument, DamagedChunk, DamagedFile

MAGIC = b"\x93STENO\r\n"
VERSION = 1
PREFIX = struct.Struct("<8sIIQ16s")
"""Magic, version, 0, bytes of the header, digest of these 24 bytes and the header."""

MAX_HEADER_BYTES = 64 << 20
SMALL_HEADER_BYTES = 1 << 20
"""A larger header has at most a quarter of the file, and one list or object in 8 bytes; others would take many times the file."""

MAX_EXPANSION = 8192
"""Decoded bytes per byte of the file; a file that claims more is refused before anything is allocated."""

ALIGNMENT = 64


def digest(*parts: Any) -> str:
    """BLAKE2b of 128 bits, in hexadecimal, of bytes or arrays of bytes."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _padding(length: int) -> bytes:
    return bytes(-length % ALIGNMENT)


@final
class FileWriter:
    """Gathers arrays, then writes them all. Mutable. Groups are numbered from 0 on; arrays of one share its chunks."""

    def __init__(self) -> None:
        self._arrays: list[tuple[int, ArrayEncoder]] = []

    def add(
        self,
        x: Tensor,
        group: int,
        *,
        offsets: Sequence[int] | None = None,
        row_tokens: int = 0,
        context_columns: int = 1,
        choose: Choice = Tables.choose,
    ) -> int:
        """Takes a matrix `[N, C]`; arguments as in `ArraySpec` and `ArrayEncoder`. Its number in the file."""
        spec = ArraySpec(
            dtype=dtype_name(x),
            columns=x.shape[1],
            offsets=tuple(offsets) if offsets is not None else (0, len(x)),
            row_tokens=row_tokens,
            context_columns=context_columns,
        )
        self._arrays.append((group, ArrayEncoder(x, spec, choose)))
        return len(self._arrays) - 1

    def write(self, path: Path, about: Mapping[str, Any]) -> int:
        """Writes the file, whole or not at all, readable by its owner alone; its bytes. about: JSON fields of the header."""
        return write_whole(path, self.parts(about))

    def parts(self, about: Mapping[str, Any]) -> list[bytes]:
        """The bytes of the file, in parts. about: JSON fields of the header."""
        tables = b"".join(t.to_bytes() for _, array in self._arrays for t in array.tables)
        data, chunks = [tables + _padding(len(tables))], []
        at = len(data[0])
        for group in sorted({group for group, _ in self._arrays}):
            arrays = [array for number, array in self._arrays if number == group]
            for chunk in range(max(array.spec.num_chunks for array in arrays)):
                body = b"".join(array.chunk(chunk) for array in arrays if chunk < array.spec.num_chunks)
                chunks.append([group, chunk, at, len(body), digest(body)])
                data.append(body + _padding(len(body)))
                at += len(data[-1])
        header = dict(about) | {
            "arrays": [
                {"group": group, **asdict(array.spec), "tables": [len(t.frequencies) for t in array.tables]}
                for group, array in self._arrays
            ],
            "tables": [0, len(tables), digest(tables)],
            "chunks": chunks,
        }
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
        if len(text) > MAX_HEADER_BYTES:
            raise BadArgument(f"a header has at most {MAX_HEADER_BYTES} bytes; this one would have {len(text)}.")
        start = PREFIX.pack(MAGIC, VERSION, 0, len(text), b"")[:24]
        front = start + bytes.fromhex(digest(start, text)) + text
        return [front + _padding(len(front)), *data]


@final
class SavedFile:
    """A file that was written by `FileWriter`, opened and mapped; header and tables are checked, chunks as they are read.

    header: its JSON object. data: uint8, the bytes of the file where they were read already; `path` only names it then.
    Raises `BadArgument` if it cannot be opened, `DamagedFile` if it is no such file.
    """

    def __init__(self, path: Path, data: np.ndarray | None = None) -> None:
        self.path = path
        self._map = _mapped(path) if data is None else data
        self.num_bytes = len(self._map)
        if self.num_bytes < PREFIX.size:
            raise self._damaged(f"it has {self.num_bytes} bytes, and a header alone has {PREFIX.size}")
        self.header = self._read_header()
        try:
            self._read_index()
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._damaged(f"its index has no {error}" if isinstance(error, KeyError) else str(error)) from None

    def _damaged(self, what: str) -> DamagedFile:
        return DamagedFile(f"{self.path} cannot be read: {what}.")

    def _read_header(self) -> dict[str, Any]:
        magic, version, zero, length, wanted = PREFIX.unpack(self._map[: PREFIX.size].tobytes())
        if magic != MAGIC:
            raise self._damaged("it does not begin like a saved context")
        if version != VERSION or zero:
            raise self._damaged(f"it has format version {version}, and this steno reads {VERSION}; use a newer one")
        if length > min(MAX_HEADER_BYTES, self.num_bytes - PREFIX.size):
            raise self._damaged(f"its header claims {length} bytes, more than the file or the format has")
        text = self._map[PREFIX.size : PREFIX.size + length].tobytes()
        if digest(self._map[:24], text) != wanted.hex():
            raise self._damaged("its header was changed or cut; the digest differs")
        if length > max(SMALL_HEADER_BYTES, self.num_bytes // 4) or (
            length > SMALL_HEADER_BYTES and 8 * (text.count(b"[") + text.count(b"{")) > length
        ):
            raise self._damaged(f"its header has {length} bytes, out of proportion to the file's {self.num_bytes}")
        self._start = PREFIX.size + length + len(_padding(PREFIX.size + length))
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is no JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        return header

    def _read_index(self) -> None:
        self.specs: list[ArraySpec] = []
        self._groups: dict[int, list[int]] = {}
        for number, entry in enumerate(_list(self.header["arrays"])):
            self.specs.append(_spec(entry))
            self._groups.setdefault(_int(entry["group"], "group"), []).append(number)
        expanded = sum(spec.num_bytes for spec in self.specs)
        if expanded > MAX_EXPANSION * self.num_bytes:
            raise ValueError(
                f"its arrays claim {expanded} bytes, more than {MAX_EXPANSION} times its own {self.num_bytes}"
            )
        self.decoded_bytes = expanded
        self._chunks: dict[int, list[tuple[int, int, str]]] = {group: [] for group in self._groups}
        for entry in _list(self.header["chunks"]):
            group, chunk, offset, length, wanted = _list(entry)
            if _int(group, "group") not in self._chunks or chunk != len(self._chunks[group]):
                raise ValueError(f"its chunk {chunk} of group {group} is out of place")
            pair = _int(offset, "an offset"), _int(length, "a length")
            self._chunks[group].append((*pair, str(wanted)))
        for group, numbers in self._groups.items():
            needed = max(self.specs[i].num_chunks for i in numbers)
            if needed != len(self._chunks[group]):
                raise ValueError(f"group {group} needs {needed} chunks and has {len(self._chunks[group])}")
        offset, length, wanted = _list(self.header["tables"])
        data = self._checked(offset, length, str(wanted), "the tables")
        self._tables: list[list[Tables]] = []
        for spec, entry in zip(self.specs, self.header["arrays"], strict=True):
            counts = [_int(n, "a number of tables", RAW) for n in _list(entry["tables"])]
            if len(counts) != num_planes(spec.dtype):
                raise ValueError(f"a {spec.dtype} array has {num_planes(spec.dtype)} planes, not {len(counts)}")
            found = []
            for count in counts:
                tables, end = Tables.from_bytes(data, spec.num_contexts, count)
                found.append(tables)
                data = data[end:]
            self._tables.append(found)
        if len(data):
            raise ValueError("its tables have bytes left over")

    def _check_range(self, offset: Any, length: Any) -> None:
        if _int(offset, "an offset") + _int(length, "a length") > self.num_bytes - self._start:
            raise ValueError(f"it ends before byte {offset + length} of its data")

    def _checked(self, offset: int, length: int, wanted: str, what: str) -> np.ndarray:
        self._check_range(offset, length)
        data = self._map[self._start + offset : self._start + offset + length]
        if digest(data) != wanted:
            raise self._damaged(f"{what} differ from their digest")
        return data

    def _chunks_of(self, group: int) -> list[np.ndarray]:
        """The bytes of the chunks of a group, all checked."""
        try:
            return [
                self._checked(offset, length, wanted, f"the bytes of chunk {chunk} of group {group}")
                for chunk, (offset, length, wanted) in enumerate(self._chunks.get(group, []))
            ]
        except (DamagedFile, ValueError) as error:
            what = str(error) if isinstance(error, DamagedFile) else f"{self.path} cannot be read: {error}."
            raise DamagedChunk(what) from None

    @property
    def groups(self) -> list[int]:
        return sorted(self._groups)

    def bytes_until(self, group: int) -> int:
        """Bytes of the file to the end of the last chunk of the groups 0 .. group."""
        ends = [offset + length for g, found in self._chunks.items() if g <= group for offset, length, _ in found]
        return self._start + max([self.header["tables"][0] + self.header["tables"][1], *ends])

    def read_group(self, group: int) -> dict[int, Tensor]:
        """The matrices of a group by their numbers; raises `DamagedChunk` if a chunk of it was cut or changed."""
        chunks = self._chunks_of(group)
        decoders = {i: ArrayDecoder(self.specs[i], self._tables[i]) for i in self._groups.get(group, [])}
        for chunk, data in enumerate(chunks):
            at = 0
            for decoder in decoders.values():
                if chunk < decoder.spec.num_chunks:
                    at = decoder.feed(chunk, data, at)
            if at != len(data):
                raise self._damaged(f"chunk {chunk} of group {group} has bytes left over")
        return {i: decoder.tensor() for i, decoder in decoders.items()}


def _mapped(path: Path) -> np.ndarray:
    """The bytes of a file, uint8, mapped."""
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return np.zeros(0, np.uint8)  # nothing can be mapped of it
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise BadArgument(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise BadArgument(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _int(value: Any, what: str, highest: int = 1 << 48) -> int:
    if type(value) is not int or not 0 <= value <= highest:
        raise ValueError(f"{what} must be a number from 0 to {highest}, not {value!r}"[:200])
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"its index has {type(value).__name__} instead of a list")
    return value


def _spec(entry: Any) -> ArraySpec:
    offsets = [_int(x, "an offset") for x in _list(entry["offsets"])]
    columns, context_columns = _int(entry["columns"], "columns"), _int(entry["context_columns"], "context_columns")
    if len(offsets) < 2 or offsets[0] or sorted(offsets) != offsets:
        raise ValueError("the offsets of an array must begin with 0 and never fall")
    if not context_columns or not columns or columns % context_columns:
        raise ValueError(f"an array of {columns} columns cannot have contexts of {context_columns}")
    if entry["row_tokens"] not in (0, 1, 64) or entry["dtype"] not in DTYPES or offsets[-1] * columns > 1 << 48:
        raise ValueError(f"an array of {entry['dtype']!r} with rows of {entry['row_tokens']!r} tokens is unknown"[:200])
    return ArraySpec(
        dtype=entry["dtype"],
        columns=columns,
        offsets=tuple(offsets),
        row_tokens=int(entry["row_tokens"]),
        context_columns=context_columns,
    )
