"""Segments whose tensors lie in a file on disk, mapped into memory, so that the system may let go of what is not read."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from typing import TypeVar

import torch
from torch import Tensor

from steno.cache.accounting import is_offloaded, tensors_of
from steno.cache.segment import Segment
from steno.errors import CacheError

ALIGNMENT_BYTES = 64
AnySegment = TypeVar("AnySegment", bound=Segment)


def offloaded(segment: AnySegment) -> AnySegment:
    """The same segment with its tensors in a file of its own, in the folder for temporary files (`TMPDIR`).

    The file has no name any more when this returns: nobody else can open it, and its space is free again when the last
    tensor is gone, whatever happens to the process. A segment that lies there already is returned as it is.
    """
    tensors = [x for x in tensors_of(segment) if x.numel()]
    if any(x.device.type != "cpu" for x in tensors):
        raise CacheError("offload=True is for models on the CPU; this one lies elsewhere: leave it out.")
    if not tensors or all(is_offloaded(x) for x in tensors):
        return segment
    sizes = [-(-x.numel() * x.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for x in tensors]
    handle, path = tempfile.mkstemp(prefix="steno-")  # readable by its owner alone
    os.close(handle)
    try:
        room = torch.from_file(path, shared=True, size=sum(sizes), dtype=torch.uint8)
    finally:
        os.unlink(path)
    moved: dict[int, Tensor] = {}
    for x, part in zip(tensors, room.split(sizes), strict=True):
        place = part[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)
        moved[id(x)] = place.copy_(x)
    return _replaced(segment, moved)


def _replaced(item: AnySegment, moved: dict[int, Tensor]) -> AnySegment:
    """A copy of a dataclass, and of those in it, with other tensors."""
    changes: dict[str, object] = {}
    for f in dataclasses.fields(item):  # type: ignore[arg-type]
        value = getattr(item, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = moved.get(id(value), value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[f.name] = _replaced(value, moved)  # type: ignore[type-var]
    return dataclasses.replace(item, **changes)  # type: ignore[type-var]
