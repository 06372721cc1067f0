"""Layers at a quality level: what they hold is decoded, transformed and stored as whole numbers; and back.

Keys are taken before rotation where the rotation is known. The first tokens, whose numbers are unlike all others, stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor

from steno.cache.layer import LayerCache
from steno.cache.paged import PagedRows
from steno.cache.segment import DenseSegment
from steno.codec import transform
from steno.codec.container import FileWriter
from steno.codec.forms import expect
from steno.codec.quality import LayerWeights
from steno.codec.rotation import Rotation
from steno.codec.tables import Tables
from steno.codec.transform import Coded, Moments, Side

NAMES = ("keys", "values")


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """At which level layers are stored, and with how many refinements."""

    quality: str
    refinements: int
    weights: LayerWeights


def refinement_group(layer_idx: int, num_layers: int, refinement: int) -> int:
    """The group of a refinement, from 1 on, of a layer; 0: of the layer itself."""
    return refinement * num_layers + layer_idx + 1


def store_coded(
    writer: FileWriter, layer: LayerCache, num_layers: int, plan: Plan, rotation: Rotation | None
) -> dict[str, Any]:
    """Adds what the one row of a layer holds to a file; the JSON fields that find it again.

    layer: its content are `PagedRows`.
    """
    content, layer_idx = layer.content, layer.layer_idx
    assert isinstance(content, PagedRows), "the caller has checked it"
    heads = content.decode_row(0, content.tail.keys.dtype)
    counts = _log_counts(content)
    keys, values = [k for k, _ in heads], [v for _, v in heads]
    num_first = [min(transform.FIRST_TOKENS, len(k)) for k in keys]
    first = [torch.cat([x[:n] for x, n in zip(side, num_first, strict=True)]) for side in (keys, values)]
    rest = [[x[n:] for x, n in zip(side, num_first, strict=True)] for side in (keys, values)]
    angles = []
    if rotation is not None:
        positions = zip(content.positions(0, layer.row_seen[0]), num_first, strict=True)
        angles = [rotation.angles(where[n:].to(keys[0].device)) for where, n in positions]
    sides = [Side(rest[0], angles), Side(rest[1])]
    moments = [Moments.of(side) for side in sides]
    steps = plan.weights.steps(plan.quality, layer_idx, [m.deviation for m in moments])
    offsets = _offsets(num_first)
    fields: dict[str, Any] = {
        "lengths": [len(k) for k in keys],
        "first": [
            writer.add(x, layer_idx + 1, offsets=offsets, context_columns=x.shape[1], choose=Tables.by_spread)
            for x in first
        ],
        "log_counts": None
        if counts is None
        else writer.add(counts[:, None], layer_idx + 1, offsets=_offsets([len(k) for k in keys]), row_tokens=1),
    }
    for name, side, of_side, step in zip(NAMES, sides, moments, steps, strict=True):
        together, directions = transform.fit(of_side, step)
        size, coded = max(1, together), []
        for h, own in zip(range(0, len(keys), size), directions, strict=True):
            mean = torch.cat(of_side.means[h : h + size])
            coded.append(transform.encode(side.of_heads(h, size), mean, own, step, num_refinements=plan.refinements))
        fields[name] = _store_side(writer, coded, layer_idx, num_layers) | {"heads_together": together}
    return fields


def _store_side(writer: FileWriter, coded: Sequence[Coded], layer_idx: int, num_layers: int) -> dict[str, Any]:
    """Adds the parts of the keys or the values of a layer, whose numbers are changed meanwhile."""
    group, width = layer_idx + 1, coded[0].coarse.shape[1]

    def add(rows: Sequence[Tensor], group: int, offset: int, context_columns: int = 1) -> int:
        numbers = torch.cat(list(rows)) if len(rows) > 1 else rows[0]
        return writer.add(
            numbers.add_(offset).view(torch.uint8),  # 128 wraps round to what it should be
            group,
            offsets=_offsets([len(x) for x in rows]),
            row_tokens=1,
            context_columns=context_columns,
            choose=Tables.by_spread,
        )

    def add_frames(rows: Sequence[Tensor]) -> int:
        return writer.add(torch.cat(list(rows)), group, context_columns=width, choose=Tables.by_spread)

    frames = [c.frame for c in coded]
    bases = [(f.basis - 128).view(torch.uint8) for f in frames if f.basis is not None]
    return {
        "mean": add_frames([f.mean[None] for f in frames]),
        "scales": add_frames([f.scales[None] for f in frames]),
        "basis": add_frames(bases) if bases else None,
        "coarse": add([c.coarse for c in coded], group, -128),
        "recent": add([c.recent for c in coded], group, 1, width),  # three symbols, and few: one table does
        "refinements": [
            add([c.refinements[r] for c in coded], refinement_group(layer_idx, num_layers, r + 1), 1)
            for r in range(len(coded[0].refinements))
        ],
    }


def _log_counts(content: PagedRows) -> Tensor | None:
    """Of every entry, head by head, `[N]` fp32; None if each is one token."""
    row, heads = content.rows[0], content.num_kv_heads
    if all(segment.log_counts is None for segment in row.segments):
        return None
    per_head: list[list[Tensor]] = [[] for _ in range(heads)]
    for segment in row.segments:
        for h, n in enumerate(segment.lengths):
            per_head[h].append(torch.zeros(n) if segment.log_counts is None else segment.log_counts[h].float())
    tail = torch.zeros(content.tail.lengths[0])
    return torch.cat([x for parts in per_head for x in (*parts, tail)])


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def read_coded(
    fields: Mapping[str, Any],
    tensors: Mapping[int, Tensor],
    positions: Sequence[Tensor],
    rotation: Rotation | None,
    like: Tensor,
) -> DenseSegment:
    """What `store_coded` stored, as one dense segment in the dtype and on the device of `like` `[Hkv, 0, D]`.

    tensors: by number, those of the refinements that are wanted among them. positions: the true ones of each head's entries.
    Raises KeyError, TypeError or ValueError for fields and arrays that do not fit.
    """
    num_heads, dim = like.shape[0], like.shape[2]
    lengths = [len(p) for p in positions]
    if fields["lengths"] != lengths:
        raise ValueError(f"it must hold {lengths} tokens of its heads, not {fields['lengths']}"[:300])
    num_first = [min(transform.FIRST_TOKENS, n) for n in lengths]
    offsets, sides = _offsets(lengths), []
    for name, number in zip(NAMES, fields["first"], strict=True):
        side = torch.empty(offsets[-1], dim, dtype=like.dtype, device=like.device)
        heads = side.split(lengths)
        first = expect(tensors[number], (sum(num_first), dim), like.dtype).split(num_first)
        for head, x in zip(heads, first, strict=True):
            head[: len(x)] = x
        rest = [head[n:] for head, n in zip(heads, num_first, strict=True)]
        turned = rotation if name == "keys" else None
        where = zip(positions, num_first, strict=True)
        angles = [] if turned is None else [turned.angles(p[n:].to(like.device)) for p, n in where]
        _read_side(fields[name], tensors, Side(rest, angles))
        sides.append(side)
    counts = None
    if fields["log_counts"] is not None:
        counts = expect(tensors[fields["log_counts"]], (sum(lengths), 1), torch.float32)[:, 0]
    assert len(lengths) == num_heads, "one head each"
    return DenseSegment(keys=sides[0], values=sides[1], offsets=tuple(offsets), counts=counts)


def _read_side(fields: Mapping[str, Any], tensors: Mapping[int, Tensor], side: Side) -> None:
    """Writes keys or values to their places."""
    lengths, dim = [len(x) for x in side.heads], side.heads[0].shape[1]
    together = fields["heads_together"]
    if type(together) is not int or not 0 <= together <= len(lengths) or len(lengths) % max(1, together):
        raise ValueError(f"{together!r} of {len(lengths)} heads cannot have a basis together")
    size = max(1, together)
    parts = [lengths[h : h + size] for h in range(0, len(lengths), size)]
    if any(len(set(part)) > 1 for part in parts):
        raise ValueError("heads with a basis together must have the same length")
    of_parts, width, num_parts = [part[0] for part in parts], dim * size, len(parts)
    mean, scales = (expect(tensors[fields[name]], (num_parts, width), torch.bfloat16) for name in ("mean", "scales"))
    basis = None
    if together:
        stored = expect(tensors[fields["basis"]], (num_parts * width, width), torch.uint8)
        basis = (stored - 128).view(torch.int8)
    recent = [min(transform.RECENT_TOKENS, n) for n in of_parts]
    coarse = _numbers(tensors[fields["coarse"]], of_parts, width, 128)
    newest = _numbers(tensors[fields["recent"]], recent, width, 1)
    if not isinstance(fields["refinements"], list):
        raise TypeError("refinements must be a list")
    finer = [_numbers(tensors[i], of_parts, width, 1) for i in fields["refinements"] if i in tensors]
    for p in range(num_parts):
        own = None if basis is None else basis[p * width : (p + 1) * width]
        frame = transform.Frame(mean=mean[p], scales=scales[p], basis=own)
        transform.decode(frame, coarse[p], newest[p], [r[p] for r in finer], side.of_heads(p * size, size))


def _numbers(rows: Tensor, lengths: Sequence[int], width: int, offset: int) -> tuple[Tensor, ...]:
    """int8 `[n, width]` of each part."""
    expect(rows, (sum(lengths), width), torch.uint8)
    return (rows - offset).view(torch.int8).split(list(lengths))
