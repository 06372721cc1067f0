"""Where the entries of a store lie: what every place must do, and what it drops when its quota is used up."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np

from steno.errors import StoreError


@final
@dataclass(frozen=True, kw_only=True)
class Entry:
    """A stored entry. used_at: seconds since 1970 when it was last written or read."""

    name: str
    num_bytes: int
    used_at: float
    is_pinned: bool = False


class Place(Protocol):
    """A flat folder of entries, safe for several processes: an entry is there whole or not at all.

    All methods raise `StoreError` if the place cannot be reached.
    """

    def read(self, name: str) -> np.ndarray | None:
        """The bytes of an entry, uint8; None if it is not there."""
        ...

    def write(self, name: str, parts: Sequence[bytes], quota_bytes: int | None) -> None:
        """Writes an entry, or overwrites it; removes others, the least recently used first, so that all fit the quota.

        Raises `StoreError` if that cannot be, because it is larger or what is pinned is.
        """
        ...

    def remove(self, name: str) -> None:
        """Removes an entry, pinned or not; nothing happens if it is not there."""
        ...

    def touch(self, names: Sequence[str]) -> None:
        """Notes that entries were used just now, each a little earlier than the one before it."""
        ...

    def pin(self, name: str, pinned: bool) -> None:
        """Keeps an entry from being removed for the quota, or lets it go again."""
        ...

    def entries(self) -> list[Entry]:
        """All entries, the least recently used first."""
        ...

    def sweep(self, quota_bytes: int | None) -> list[str]:
        """Removes what interrupted writes left behind, and what is over the quota; the names of removed entries."""
        ...


def victims(
    entries: Collection[Entry], quota_bytes: int | None, *, new: str | None = None, new_bytes: int = 0
) -> list[Entry]:
    """The entries that must go, least recently used first, so that the others and a new one fit the quota.

    Raises `StoreError` if pinned ones leave too little room.
    """
    if quota_bytes is None:
        return []
    others = [entry for entry in entries if entry.name != new]
    excess = sum(entry.num_bytes for entry in others) + new_bytes - quota_bytes
    found: list[Entry] = []
    for entry in sorted(others, key=lambda entry: entry.used_at):
        if excess <= 0:
            break
        if not entry.is_pinned:
            found.append(entry)
            excess -= entry.num_bytes
    if excess > 0 and new is not None:
        raise StoreError(
            f"an entry of {new_bytes} bytes must fit the quota of {quota_bytes} beside what is pinned; {excess} bytes are "
            "missing: raise the quota or unpin something."
        )
    return found
