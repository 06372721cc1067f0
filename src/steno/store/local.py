"""A place in a folder of this machine. No index: the folder is it; the time of a file says when it was last used.

Writers and sweepers hold a lock, so the one unfinished file has a fixed name and the next writer overwrites what a killed one
left of it. Readers need no lock: a file that is replaced or removed stays readable to those who have it open.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

import numpy as np
from filelock import FileLock, Timeout

from steno.codec.whole import PRIVATE_FILE, make_folder, sync_folder, write_whole
from steno.errors import BadArgument, StoreError
from steno.store.place import Entry, victims

UNFINISHED, LOCK, PIN = ".unfinished", ".lock", ".pin"
LOCK_TIMEOUT_S = 120
STEP_NS = 1000
"""How much earlier each further name of `touch` counts as used."""


@final
class LocalPlace:
    """Entries as files of mode 0600 in a folder of mode 0700, which is made with the first one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> np.ndarray | None:
        """The file, mapped."""
        try:
            with (self.folder / name).open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    return np.zeros(0, np.uint8)
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read {self.folder / name}: {error.strerror or error}") from None

    def write(self, name: str, parts: Sequence[bytes], quota_bytes: int | None) -> None:
        with self._locked():
            new_bytes, present = sum(map(len, parts)), self.entries()
            gone = victims(present, quota_bytes, new=name, new_bytes=new_bytes)
            for entry in gone:
                self._unlink(entry.name)
            kept_bytes = sum(entry.num_bytes for entry in present) - sum(entry.num_bytes for entry in gone)
            if quota_bytes is not None and kept_bytes + new_bytes > quota_bytes:
                (self.folder / name).unlink(missing_ok=True)  # there is no room for the old and the new one at once
            try:
                write_whole(self.folder / name, parts, temporary=self.folder / UNFINISHED)
            except BadArgument as error:
                raise StoreError(str(error)) from None

    def remove(self, name: str) -> None:
        if not (self.folder / name).exists():
            return
        with self._locked():
            self._unlink(name)
            sync_folder(self.folder)

    def touch(self, names: Sequence[str]) -> None:
        now = time.time_ns()
        for i, name in enumerate(names):
            with suppress(OSError):  # it was removed meanwhile, or the folder may only be read
                os.utime(self.folder / name, ns=(now - i * STEP_NS, now - i * STEP_NS))

    def pin(self, name: str, pinned: bool) -> None:
        with self._locked():
            if pinned:
                handle = os.open(self.folder / (name + PIN), os.O_WRONLY | os.O_CREAT, PRIVATE_FILE)
                os.close(handle)
            else:
                (self.folder / (name + PIN)).unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        found: dict[str, os.stat_result] = {}
        pins = set()
        try:
            with os.scandir(self.folder) as files:
                for file in files:
                    if file.name.startswith("."):
                        continue
                    if file.name.endswith(PIN):
                        pins.add(file.name.removesuffix(PIN))
                        continue
                    with suppress(FileNotFoundError):  # removed meanwhile
                        found[file.name] = file.stat()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot list {self.folder}: {error.strerror or error}") from None
        entries = [
            Entry(name=name, num_bytes=stat.st_size, used_at=stat.st_mtime_ns / 1e9, is_pinned=name in pins)
            for name, stat in found.items()
        ]
        return sorted(entries, key=lambda entry: (entry.used_at, entry.name))

    def sweep(self, quota_bytes: int | None) -> list[str]:
        if not self.folder.is_dir():
            return []
        with self._locked():
            (self.folder / UNFINISHED).unlink(missing_ok=True)
            present = self.entries()
            names = {entry.name for entry in present}
            for path in self.folder.glob("*" + PIN):
                if path.name.removesuffix(PIN) not in names:
                    path.unlink(missing_ok=True)
            gone = [entry.name for entry in victims(present, quota_bytes)]
            for name in gone:
                self._unlink(name)
            return gone

    def _unlink(self, name: str) -> None:
        for path in (self.folder / name, self.folder / (name + PIN)):
            path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock of the folder, which the system takes back from a process that dies."""
        try:
            make_folder(self.folder)
            lock = FileLock(self.folder / LOCK, timeout=LOCK_TIMEOUT_S, mode=PRIVATE_FILE)
            with lock:
                yield
        except Timeout:
            raise StoreError(
                f"{self.folder} was locked by another process for {LOCK_TIMEOUT_S} s; try again."
            ) from None
        except OSError as error:
            raise StoreError(f"cannot write to {self.folder}: {error.strerror or error}") from None
