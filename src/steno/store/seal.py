"""Entries that only who has the tenant's key can read or make: AES-GCM (NIST SP 800-38D), an extra (`stenokv[seal]`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import final

import numpy as np

from steno.errors import BadArgument, DamagedFile

MAGIC = b"\x93STENOX\n"
NONCE_BYTES, TAG_BYTES = 12, 16
KEY_BYTES = (16, 24, 32)


@final
class Seal:
    """Seals and opens entries. key: 16, 24 or 32 random bytes; `address_key` is what addresses are made of with it.

    A sealed entry: `MAGIC`, a random nonce of 12 bytes, the encrypted bytes and their tag. The name of the entry is authenticated
    with them, so that entries cannot change places. Raises `BadArgument` for another key, or without the package.
    """

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError:
            raise BadArgument(
                "a store with a key needs the package cryptography: pip install 'stenokv[seal]'."
            ) from None
        if not isinstance(key, bytes) or len(key) not in KEY_BYTES:
            raise BadArgument(f"a key must have 16, 24 or 32 bytes; got {len(key)}.")
        self._invalid: type[Exception] = InvalidTag
        self._cipher = AESGCM(key)
        self.address_key: bytes = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"steno address").derive(key)

    def close(self, name: str, parts: Sequence[bytes]) -> list[bytes]:
        """The sealed bytes of an entry."""
        nonce = os.urandom(NONCE_BYTES)
        return [MAGIC + nonce, self._cipher.encrypt(nonce, b"".join(parts), name.encode())]

    def open(self, name: str, data: np.ndarray) -> np.ndarray:
        """What was sealed; raises `DamagedFile` if it was changed, or sealed under another name or key, or not at all."""
        start = len(MAGIC) + NONCE_BYTES
        front = data[:start].tobytes()
        if len(data) < start + TAG_BYTES or not front.startswith(MAGIC):
            raise DamagedFile(f"the entry {name} must be sealed, and is not.")
        try:
            plain = self._cipher.decrypt(front[len(MAGIC) :], data[start:].tobytes(), name.encode())
        except self._invalid:
            raise DamagedFile(f"the entry {name} was changed, or sealed with another key.") from None
        return np.frombuffer(plain, np.uint8)
