"""Bytes of a cache of transformers, for the workers that run on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def held_bytes(root: Any) -> int:
    """Sum over the distinct storages of all tensors reachable from `root`, those inside tensor subclasses too."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain_tensors(root, set())}
    return sum(storages.values())


def plain_tensors(item: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(item) in seen or item is None or isinstance(item, (str, bytes, int, float, type)):
        return
    seen.add(id(item))
    if isinstance(item, torch.Tensor):
        if not hasattr(item, "__tensor_flatten__"):
            yield item
            return
        for name in item.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(item, name), seen)
    elif isinstance(item, dict):
        for value in item.values():
            yield from plain_tensors(value, seen)
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from plain_tensors(value, seen)
    elif hasattr(item, "__dict__") and type(item).__module__.startswith("transformers.cache_utils"):
        yield from plain_tensors(vars(item), seen)
