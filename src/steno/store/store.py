"""A store: one tenant's entries at one place, under one quota, sealed or not."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np

from steno.errors import BadArgument
from steno.store.address import tenant_folder
from steno.store.local import LocalPlace
from steno.store.place import Entry, Place
from steno.store.redis import RedisPlace
from steno.store.remote import RemotePlace
from steno.store.seal import Seal

NAME = re.compile(r"[0-9a-f]{64}\.(chunk|context)")


@final
class Store:
    """What was read before, by the address of its content.

    Parameters
    ----------
    source : str or Path
        A folder; or a URL: `memory://NAME`, `redis://HOST:PORT/0` (also `rediss`, `valkey`, `unix`), or any that fsspec
        opens, such as `s3://bucket/folder`.
    tenant : str
        Whose entries: those of others have other addresses, lie in another folder and are never seen.
    quota_bytes : int or None
        The most that all entries of the tenant may take together; when it is used up, the least recently used ones go.
    key : bytes or None
        The tenant's secret, 16, 24 or 32 bytes: entries are then encrypted with AES-GCM, and not to be found without it.
    options
        For fsspec, such as `endpoint_url`.

    Raises
    ------
    BadArgument
        If an argument cannot be used, or a package for it is not installed.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        tenant: str = "",
        quota_bytes: int | None = None,
        key: bytes | None = None,
        **options: object,
    ) -> None:
        if quota_bytes is not None and quota_bytes < 1:
            raise BadArgument(f"`quota_bytes` must be >= 1; got quota_bytes={quota_bytes}.")
        self.source, self.tenant, self.quota_bytes = str(source), tenant, quota_bytes
        self._seal = Seal(key) if key is not None else None
        self._place = _place(source, tenant_folder(tenant), options)

    def __repr__(self) -> str:
        return f"Store({self.source!r}, tenant={self.tenant!r})"

    @property
    def secret(self) -> bytes | None:
        """What addresses are made of beside their content; None where entries are not sealed."""
        return self._seal.address_key if self._seal is not None else None

    def get(self, name: str) -> np.ndarray | None:
        """The bytes of an entry, uint8; None if it is not there. Raises `DamagedFile` if its seal is broken."""
        data = self._place.read(_checked(name))
        return data if data is None or self._seal is None else self._seal.open(name, data)

    def put(self, name: str, parts: Sequence[bytes]) -> None:
        """Writes an entry, and removes what is over the quota. Raises `StoreError` if there is no room."""
        _checked(name)
        self._place.write(name, parts if self._seal is None else self._seal.close(name, parts), self.quota_bytes)

    def used(self, names: Sequence[str]) -> None:
        """Notes that entries were used, so that they go last; the first of them the very last."""
        self._place.touch([_checked(name) for name in names])

    def remove(self, name: str) -> None:
        """Removes an entry, if it is there."""
        self._place.remove(_checked(name))

    def pin(self, names: Sequence[str], pinned: bool = True) -> None:
        """Keeps entries from being removed for the quota, or lets them go again."""
        for name in names:
            self._place.pin(_checked(name), pinned)

    def entries(self) -> list[Entry]:
        """All entries, the least recently used first."""
        return [entry for entry in self._place.entries() if NAME.fullmatch(entry.name)]

    def sweep(self) -> list[str]:
        """Removes what interrupted writes left, and what is over the quota; the names of removed entries."""
        return self._place.sweep(self.quota_bytes)


def as_store(store: Store | str | Path | None) -> Store | None:
    """A store from itself, or from where it is."""
    return Store(store) if isinstance(store, str | Path) else store


def read_key(path: Path) -> bytes:
    """A key from a file that holds its 16, 24 or 32 bytes, or twice as many hexadecimal digits.

    Raises `BadArgument` if there is none, or others than its owner can read it.
    """
    try:
        data = path.read_bytes()
        others = os.name != "nt" and path.stat().st_mode & 0o077
    except OSError as error:
        raise BadArgument(f"cannot read the key {path}: {error.strerror or error}") from None
    if others:
        raise BadArgument(f"the key {path} can be read by others: chmod 600 it.")
    text = data.strip()
    if len(text) in (32, 48, 64) and re.fullmatch(rb"[0-9a-fA-F]+", text):
        return bytes.fromhex(text.decode())
    if len(data) not in (16, 24, 32):
        raise BadArgument(f"the key {path} must have 16, 24 or 32 bytes, or twice as many hexadecimal digits.")
    return data


def _place(source: str | Path, folder: str, options: dict[str, object]) -> Place:
    text = str(source)
    scheme = text.split("://", 1)[0] if isinstance(source, str) and "://" in text else "file"
    if scheme in ("redis", "rediss", "valkey", "valkeys", "unix"):
        return RedisPlace(text, folder)
    if scheme == "file":
        if options:
            raise BadArgument(f"a folder takes no options; got {', '.join(options)}.")
        return LocalPlace(Path(text.removeprefix("file://")).expanduser() / folder)
    return RemotePlace(f"{text.rstrip('/')}/{folder}", **options)


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise BadArgument(f"an entry has a name of 64 hexadecimal digits and .chunk or .context; got {name[:80]!r}.")
    return name
