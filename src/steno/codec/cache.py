"""What a cache holds, as a file and back: one row of each layer, segments, tail and the bitmap of what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steno.cache.layer import LayerCache
from steno.cache.paged import PagedRows
from steno.cache.row import Row, positions_of, unpack_kept
from steno.cache.segment import DenseSegment
from steno.cache.tail import Tail
from steno.cache.write import SegmentWriter
from steno.codec.container import FileWriter, SavedFile
from steno.codec.forms import Matrix, bases_of, build_segment, check_bases, expect, store_segment
from steno.codec.lossy import Plan, read_coded, refinement_group, store_coded
from steno.codec.quality import MAX_REFINEMENTS
from steno.codec.rotation import Rotation
from steno.codec.whole import write_whole
from steno.errors import CacheError, DamagedFile, IntegrityError
from steno.models.kvcache import KVCache
from steno.types import Need

TOKEN_GROUP = 0
"""The group of the token ids; layer i is group i + 1."""


def save_cache(
    path: Path, cache: KVCache, tokens: Sequence[int], about: Mapping[str, Any], plan: Plan | None = None
) -> int:
    """Writes a cache of one sequence and the tokens that it read; the bytes of the file. about: more for the header.

    plan: the level at which layers are stored; None: losslessly.

    Raises `CacheError` if it holds what a file cannot, `BadArgument` if the file cannot be written.
    """
    return write_whole(path, cache_parts(cache, tokens, about, plan))


def cache_parts(
    cache: KVCache, tokens: Sequence[int], about: Mapping[str, Any], plan: Plan | None = None
) -> list[bytes]:
    """The bytes that `save_cache` writes, in parts."""
    writer = FileWriter()
    ids = torch.tensor(tokens, dtype=torch.int32)[:, None]
    stored = {"tokens": writer.add(ids, TOKEN_GROUP, offsets=(0, len(ids)), row_tokens=1)}
    held = [_savable(i, layer) for i, layer in enumerate(cache.layers)]
    entries = _store_layers(writer, held) if plan is None else _store_coded_layers(writer, held, plan)
    return writer.parts(dict(about) | {"recipe": str(cache.recipe), "cache": stored | {"layers": entries}})


def _savable(idx: int, layer: Any) -> LayerCache:
    """The layer; raises `CacheError` if a file cannot hold it."""
    if not isinstance(layer, LayerCache):
        raise CacheError(
            f"a file cannot hold layer {idx}, a {type(layer).__name__} of transformers, yet; the context stays in memory."
        )
    if not isinstance(layer.content, PagedRows):
        raise CacheError(
            "a file cannot hold the slots of a method that evicts at every step yet; save with another recipe."
            if layer.content is not None
            else "a cache can be saved once its prompt is read and compressed; this one is not."
        )
    if len(layer.row_seen) != 1:
        raise CacheError(f"a file holds one sequence; this cache has {len(layer.row_seen)}.")
    return layer


def _store_coded_layers(writer: FileWriter, layers: Sequence[LayerCache], plan: Plan) -> list[dict[str, Any]]:
    entries, rotations = [], dict[tuple[float, ...], Rotation]()
    for layer in layers:
        rotation = Rotation.of(layer, torch.device("cpu"))
        if rotation is not None:
            rotation = rotations.setdefault(rotation.frequencies, rotation)
        coded = store_coded(writer, layer, len(layers), plan, rotation)
        coded["frequencies"] = None if rotation is None else list(rotation.frequencies)
        entries.append(_common(writer, layer) | {"coded": coded})
    return entries


def _common(writer: FileWriter, layer: LayerCache) -> dict[str, Any]:
    content = layer.content
    assert isinstance(content, PagedRows), "it is savable"
    row, (num_heads, _, head_dim) = content.rows[0], content.tail.row(0)[0].shape
    return {
        "seen_tokens": layer.row_seen[0],
        "kv_heads": num_heads,
        "head_dim": head_dim,
        "prompt_tokens": row.prompt_tokens,
        "kept": None
        if row.kept is None
        else writer.add(row.kept, layer.layer_idx + 1, context_columns=row.kept.shape[1]),
    }


def _store_layers(writer: FileWriter, layers: Sequence[LayerCache]) -> list[dict[str, Any]]:
    return [_store_layer(writer, layer) for layer in layers]


def _store_layer(writer: FileWriter, layer: LayerCache) -> dict[str, Any]:
    idx, rows = layer.layer_idx, layer.content
    assert isinstance(rows, PagedRows), "it is savable"
    check_bases(rows.rows[0].bases)
    keys, values = rows.tail.row(0)
    num_heads, num_tail, head_dim = keys.shape
    return _common(writer, layer) | {
        "segments": [_store_segment(writer, idx, segment) for segment in rows.rows[0].segments],
        "tail": [
            writer.add(
                x.reshape(-1, head_dim), idx + 1, offsets=[h * num_tail for h in range(num_heads + 1)], row_tokens=1
            )
            for x in (keys, values)
        ],
    }


def _store_segment(writer: FileWriter, idx: int, segment: Any) -> dict[str, Any]:
    name, stored = store_segment(segment)

    def add(matrix: Matrix) -> int:
        return writer.add(
            matrix.rows,
            idx + 1,
            offsets=matrix.offsets,
            row_tokens=matrix.row_tokens,
            context_columns=matrix.context_columns,
        )

    return {"form": name, **stored.fields, "arrays": {key: add(matrix) for key, matrix in stored.matrices.items()}}


def read_tokens(file: SavedFile) -> list[int]:
    """The tokens that the saved cache read; raises `DamagedFile` if they are not there."""
    try:
        ids = file.read_group(TOKEN_GROUP)[file.header["cache"]["tokens"]]
    except (KeyError, TypeError) as error:
        raise _damaged(file, f"it lacks its tokens ({error})") from None
    if ids.dtype != torch.int32 or ids.shape[1] != 1 or (len(ids) and int(ids.min()) < 0):
        raise _damaged(file, "its tokens are no token ids")
    tokens: list[int] = ids[:, 0].tolist()
    return tokens


def restore_cache(
    file: SavedFile,
    cache: KVCache,
    *,
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    refinements: int | None = None,
) -> None:
    """Fills an empty cache with what a file holds that has seen `num_tokens` tokens.

    refinements: how many of a file that has some are read, None: all. The file may end after them.
    Raises `DamagedFile` if it does not fit the model and recipe of `cache`.
    device, dtype: of the model; the file must hold keys and values of that dtype, as no value is changed.
    """
    heads = cache.config.num_key_value_heads
    dim = getattr(cache.config, "head_dim", None) or cache.config.hidden_size // cache.config.num_attention_heads
    try:
        entries = file.header["cache"]["layers"]
        if len(entries) != len(cache.own_layers):
            raise ValueError(f"it has {len(entries)} layers and the model {len(cache.own_layers)}")
        rotations: dict[str, Rotation] = {}
        for idx, (entry, layer) in enumerate(zip(entries, cache.own_layers, strict=True)):
            if (entry["kv_heads"], entry["head_dim"]) != (heads, dim):
                raise ValueError(f"its layer {idx} has other heads than the model, {heads} of dimension {dim}")
            if entry["seen_tokens"] != num_tokens:
                raise ValueError(f"its layer {idx} has seen {entry['seen_tokens']} tokens of {num_tokens}")
            tensors = _layer_tensors(file, entry, idx, len(entries), refinements)
            _restore_layer(entry, layer, {i: x.to(device) for i, x in tensors.items()}, dtype, rotations)
        cache.check_integrity()
    except (KeyError, TypeError, ValueError, AttributeError, IntegrityError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise _damaged(file, what[:300]) from None


def _layer_tensors(
    file: SavedFile, entry: Mapping[str, Any], idx: int, num_layers: int, refinements: int | None
) -> dict[int, Tensor]:
    """The matrices of a layer by their numbers, those of its refinements among them."""
    stored = len(entry["coded"]["keys"]["refinements"]) if "coded" in entry else 0
    if stored > MAX_REFINEMENTS:
        raise ValueError(f"its layer {idx} has {stored} refinements, and there are at most {MAX_REFINEMENTS}")
    count = stored if refinements is None else min(refinements, stored)
    groups = [file.read_group(refinement_group(idx, num_layers, r)) for r in range(count + 1)]
    return {number: x for group in groups for number, x in group.items()}


def _restore_layer(
    entry: Mapping[str, Any],
    layer: LayerCache,
    tensors: Mapping[int, Tensor],
    dtype: torch.dtype,
    rotations: dict[str, Rotation],
) -> None:
    """Fills one layer. rotations: those that earlier layers had, which know their angles."""
    heads, dim, seen, prompt_tokens = (
        _count(entry, name) for name in ("kv_heads", "head_dim", "seen_tokens", "prompt_tokens")
    )
    row = Row(prompt_tokens=prompt_tokens, kept=_bitmap(entry, tensors, heads, prompt_tokens, seen))
    device = next(iter(tensors.values())).device
    keys = values = torch.empty(heads, 0, dim, dtype=dtype, device=device)
    if "coded" in entry:
        row.segments.append(_read_coded(entry["coded"], tensors, positions_of(row, seen, heads), keys, rotations))
    else:
        for fields in entry["segments"]:
            parts = {name: tensors[i] for name, i in fields["arrays"].items()}
            row.segments.append(build_segment(fields["form"], fields, parts, num_kv_heads=heads, head_dim=dim))
        row.bases = bases_of(layer.policy.transforms, dim, device)
        keys, values = (tensors[i] for i in entry["tail"])
        num_tail = len(keys) // heads
        keys, values = (expect(x, (heads * num_tail, dim), dtype).reshape(heads, num_tail, dim) for x in (keys, values))
    tail = Tail.of([(keys, values)], layer.policy.residual_tokens)
    rope = layer.rope_of(device) if Need.ROPE in layer.policy.needs else None
    writer = SegmentWriter(policy=layer.policy, layer_idx=layer.layer_idx, num_layers=layer.num_layers, rope=rope)
    layer.content = PagedRows([row], tail, writer, layer.reading.shared)
    layer.seen, layer.row_seen, layer.is_initialized = seen, [seen], True
    layer.token_bytes = 2 * heads * dim * dtype.itemsize
    layer.measure()


def _read_coded(
    fields: Mapping[str, Any],
    tensors: Mapping[int, Tensor],
    positions: Sequence[Tensor],
    like: Tensor,
    rotations: dict[str, Rotation],
) -> DenseSegment:
    rotation, name = None, repr(fields["frequencies"])
    if fields["frequencies"] is not None:
        if name not in rotations:
            rotations[name] = Rotation.from_json(fields["frequencies"], like.shape[2])
        rotation = rotations[name]
    return read_coded(fields, tensors, positions, rotation, like)


def _bitmap(
    entry: Mapping[str, Any], tensors: Mapping[int, Tensor], heads: int, prompt_tokens: int, seen: int
) -> Tensor | None:
    if entry["kept"] is None:
        return None
    kept = tensors[entry["kept"]].cpu()
    if tuple(kept.shape) != (heads, -(-prompt_tokens // 8)) or kept.dtype != torch.uint8:
        raise ValueError(f"its bitmap of {heads} heads and {prompt_tokens} tokens is {[*kept.shape]}")
    if prompt_tokens > seen or any(int(index.max()) >= prompt_tokens for index in unpack_kept(kept) if len(index)):
        raise ValueError(f"its bitmap keeps tokens beyond the prompt of {prompt_tokens}")
    return kept


def _count(entry: Mapping[str, Any], name: str) -> int:
    value = entry[name]
    if type(value) is not int or not (name != "prompt_tokens") <= value < 1 << 31:
        raise ValueError(f"{name} must be a count; got {value!r}")
    return value


def _damaged(file: SavedFile, what: str) -> DamagedFile:
    return DamagedFile(f"{file.path} cannot be opened: {what}.")
