"""Addresses: what an entry holds says where it lies, so whoever reads the same text with the same model finds it.

The address of a chunk is a SHA-256 over the address before it and its tokens, the first over everything else that its numbers
depend on. So two texts share the chunks of their common beginning, and nothing else can have the same address.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from steno.codec.arrays import CHUNK_TOKENS

CHUNK, CONTEXT = ".chunk", ".context"
"""How names of entries end: 256 tokens of all layers, dense; or a whole context, the bytes of a `.steno` file."""

VERSION = 1


def root_of(about: Mapping[str, Any], recipe: str, tenant: str, secret: bytes | None) -> bytes:
    """The address before the first chunk. about: what identifies the model; secret: of a tenant whose entries are sealed."""
    text = json.dumps([VERSION, CHUNK_TOKENS, about, recipe, tenant], sort_keys=True).encode()
    return hashlib.sha256(text).digest() if secret is None else hmac.digest(secret, text, "sha256")


def next_address(before: bytes, tokens: Sequence[int]) -> bytes:
    """The address of a chunk behind another one, or behind the root."""
    return hashlib.sha256(before + np.asarray(tokens, "<i4").tobytes()).digest()


def chunk_names(root: bytes, tokens: Sequence[int]) -> list[str]:
    """The names of the whole chunks of a text, in order."""
    names, at = [], root
    for first, last in pairwise(range(0, len(tokens) + 1, CHUNK_TOKENS)):
        at = next_address(at, tokens[first:last])
        names.append(at.hex() + CHUNK)
    return names


def context_name(root: bytes, tokens: Sequence[int], how: Mapping[str, Any]) -> str:
    """The name of a whole context. how: all else that decides what it holds."""
    at = next_address(root, tokens)
    return hashlib.sha256(at + json.dumps(how, sort_keys=True).encode()).hexdigest() + CONTEXT


def tenant_folder(tenant: str) -> str:
    """The folder of a tenant's entries."""
    return hashlib.sha256(b"steno tenant " + tenant.encode()).hexdigest()[:32]
