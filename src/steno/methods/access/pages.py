"""Keys by pages, for the methods whose index has one vector per page."""

from __future__ import annotations

from torch import Tensor

from steno.types import PAGE_TOKENS


def whole_pages(keys: Tensor) -> Tensor:
    """Keys `[n, D]` as `[P, 64, D]`, the last page filled up with its last key; whatever is largest or smallest stays so."""
    missing = -len(keys) % PAGE_TOKENS
    index = [*range(len(keys)), *[len(keys) - 1] * missing]
    return (keys[index] if missing else keys).reshape(-1, PAGE_TOKENS, keys.shape[1])
