"""A place behind fsspec: memory, and with their packages S3-compatible stores, Google Cloud, Azure, SFTP and others.

A file is written whole, as object stores do, and there is no lock: several writers may go over the quota together until one
of them writes again. What was cut all the same is found by its digest and read anew. Beside an entry lies an empty file
`NAME.used` once it was used, since most of these places do not let the time of a file be set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar, final

import fsspec
import numpy as np

from steno.errors import BadArgument, StoreError
from steno.store.place import Entry, victims

PIN, USED = ".pin", ".used"
TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
"""What the file systems of fsspec call the time of a file."""

T = TypeVar("T")


@final
class RemotePlace:
    """Entries as files below a URL that fsspec opens, e.g. `s3://bucket/folder`; `memory://name` is this process's memory.

    Raises `BadArgument` if no file system is known for it.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        except (ImportError, ValueError, TypeError) as error:
            raise BadArgument(f"no file system is there for the store {url}: {error}") from None
        self._root = root.rstrip("/") + "/"
        self._used_at: dict[str, float] = {}  # as far as this process knows, so that not every use writes a file

    def read(self, name: str) -> np.ndarray | None:
        try:
            return np.frombuffer(self._do(lambda: self._fs.cat_file(self._root + name)), np.uint8)
        except FileNotFoundError:
            return None

    def write(self, name: str, parts: Sequence[bytes], quota_bytes: int | None) -> None:
        data = b"".join(parts)
        for entry in victims(self.entries(), quota_bytes, new=name, new_bytes=len(data)):
            self.remove(entry.name)
        self._do(lambda: self._fs.makedirs(self._root, exist_ok=True))
        self._do(lambda: self._fs.pipe_file(self._root + name, data))

    def remove(self, name: str) -> None:
        for path in (name, name + PIN, name + USED):
            try:
                self._do(lambda path=path: self._fs.rm_file(self._root + path))  # type: ignore[misc]
            except FileNotFoundError:
                continue

    def touch(self, names: Sequence[str]) -> None:
        """The order within one call is kept only as well as the times of the place tell it."""
        now = time.time()
        for name in reversed(names):
            if now - self._used_at.get(name, 0.0) > 60:
                self._used_at[name] = now
                self._do(lambda name=name: self._fs.pipe_file(self._root + name + USED, b""))  # type: ignore[misc]

    def pin(self, name: str, pinned: bool) -> None:
        try:
            if pinned:
                self._do(lambda: self._fs.pipe_file(self._root + name + PIN, b""))
            else:
                self._do(lambda: self._fs.rm_file(self._root + name + PIN))
        except FileNotFoundError:
            return

    def entries(self) -> list[Entry]:
        files = self._files()
        entries = [
            Entry(
                name=name,
                num_bytes=int(info["size"] or 0),
                used_at=max(_time(info), _time(files.get(name + USED, {}))),
                is_pinned=name + PIN in files,
            )
            for name, info in files.items()
            if not name.endswith((PIN, USED)) and not name.startswith(".")
        ]
        return sorted(entries, key=lambda entry: (entry.used_at, entry.name))

    def sweep(self, quota_bytes: int | None) -> list[str]:
        files = self._files()
        for name in files:
            for suffix in (PIN, USED):
                if name.endswith(suffix) and name.removesuffix(suffix) not in files:
                    self._do(lambda name=name: self._fs.rm_file(self._root + name))  # type: ignore[misc]
        gone = [entry.name for entry in victims(self.entries(), quota_bytes)]
        for name in gone:
            self.remove(name)
        return gone

    def _files(self) -> dict[str, dict[str, Any]]:
        try:
            listed = self._do(lambda: self._fs.ls(self._root.rstrip("/"), detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        return {info["name"].rsplit("/", 1)[-1]: info for info in listed if info["type"] == "file"}

    def _do(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except FileNotFoundError:
            raise
        except Exception as error:  # each file system has its own
            raise StoreError(
                f"the store {self.url} cannot be used: {str(error)[:300] or type(error).__name__}"
            ) from error


def _time(info: dict[str, Any]) -> float:
    found = next((info[name] for name in TIMES if info.get(name) is not None), 0.0)
    if isinstance(found, str):
        found = datetime.fromisoformat(found.replace("Z", "+00:00"))
    return found.timestamp() if isinstance(found, datetime) else float(found)
