"""Bytes that are really held: distinct storages of every tensor reachable from an object."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def tensors_of(root: Any) -> Iterator[Tensor]:
    """Every tensor reachable from `root` through attributes, dataclass fields and containers, each object once."""
    stack, seen = [root], set()
    while stack:
        item = stack.pop()
        if item is None or isinstance(item, (str, bytes, int, float, bool, type)) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(item)
        elif dataclasses.is_dataclass(item):
            stack.extend(getattr(item, f.name) for f in dataclasses.fields(item))
        elif type(item).__module__.startswith(("steno.", "transformers.cache_utils")):
            stack.extend(vars(item).values())


def is_offloaded(x: Tensor) -> bool:
    """Whether a tensor lies in a file, mapped into memory."""
    return x.device.type == "cpu" and x.untyped_storage().filename is not None


def held_bytes(root: Any) -> int:
    """Sum over the distinct storages in memory of all tensors reachable from `root`."""
    return _storage_bytes(x for x in tensors_of(root) if not is_offloaded(x))


def offloaded_bytes(root: Any) -> int:
    """The same over the storages that lie in files."""
    return _storage_bytes(x for x in tensors_of(root) if is_offloaded(x))


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Meter:
    """Bytes held by all layers of a cache, and the most there ever was, a dense layer in work included. Mutable."""

    def __init__(self) -> None:
        self.per_layer: dict[int, int] = {}
        self.held_bytes = 0
        self.peak_bytes = 0

    def set_layer(self, layer_idx: int, num_bytes: int) -> None:
        self.held_bytes += num_bytes - self.per_layer.get(layer_idx, 0)
        self.per_layer[layer_idx] = num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def touch(self, extra_bytes: int) -> None:
        """Notes a moment at which `extra_bytes` stood beside what the layers hold."""
        self.peak_bytes = max(self.peak_bytes, self.held_bytes + extra_bytes)
