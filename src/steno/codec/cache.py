"""What a cache holds, as a file and back: one row of each layer, segments, tail and the bitmap of what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steno.cache.layer import LayerCache
from steno.cache.paged import PagedRows
from steno.cache.row import Row, unpack_kept
from steno.cache.tail import Tail
from steno.cache.write import SegmentWriter
from steno.codec.container import FileWriter, SavedFile
from steno.codec.forms import Matrix, build_segment, store_segment
from steno.codec.whole import write_whole
from steno.errors import CacheError, DamagedFile, IntegrityError
from steno.models.kvcache import KVCache
from steno.types import Need

TOKEN_GROUP = 0
"""The group of the token ids; layer i is group i + 1."""


def save_cache(path: Path, cache: KVCache, tokens: Sequence[int], about: Mapping[str, Any]) -> int:
    """Writes a cache of one sequence and the tokens that it read; the bytes of the file. about: more for the header.

    Raises `CacheError` if it holds what a file cannot, `BadArgument` if the file cannot be written.
    """
    return write_whole(path, cache_parts(cache, tokens, about))


def cache_parts(cache: KVCache, tokens: Sequence[int], about: Mapping[str, Any]) -> list[bytes]:
    """The bytes that `save_cache` writes, in parts."""
    writer = FileWriter()
    ids = torch.tensor(tokens, dtype=torch.int32)[:, None]
    stored = {"tokens": writer.add(ids, TOKEN_GROUP, offsets=(0, len(ids)), row_tokens=1)}
    layers = [_store_layer(writer, i, layer) for i, layer in enumerate(cache.layers)]
    return writer.parts(dict(about) | {"recipe": str(cache.recipe), "cache": stored | {"layers": layers}})


def _store_layer(writer: FileWriter, idx: int, layer: Any) -> dict[str, Any]:
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
    rows, row = layer.content, layer.content.rows[0]
    if row.bases:
        raise CacheError("a file cannot hold segments in another basis yet; save with a recipe without a transform.")
    if rows.selector is not None:
        raise CacheError(
            "a file cannot hold what page selection reads yet; save with a recipe without an access stage."
        )
    keys, values = rows.tail.row(0)
    num_heads, num_tail, head_dim = keys.shape
    return {
        "seen_tokens": layer.row_seen[0],
        "kv_heads": num_heads,
        "head_dim": head_dim,
        "prompt_tokens": row.prompt_tokens,
        "kept": None if row.kept is None else writer.add(row.kept, idx + 1, context_columns=row.kept.shape[1]),
        "segments": [_store_segment(writer, idx, segment) for segment in row.segments],
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
    file: SavedFile, cache: KVCache, *, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Fills an empty cache with what a file holds that has seen `num_tokens` tokens.

    Raises `DamagedFile` if it does not fit the model and recipe of `cache`.
    device, dtype: of the model; the file must hold keys and values of that dtype, as no value is changed.
    """
    heads = cache.config.num_key_value_heads
    dim = getattr(cache.config, "head_dim", None) or cache.config.hidden_size // cache.config.num_attention_heads
    try:
        entries = file.header["cache"]["layers"]
        if len(entries) != len(cache.own_layers):
            raise ValueError(f"it has {len(entries)} layers and the model {len(cache.own_layers)}")
        for idx, (entry, layer) in enumerate(zip(entries, cache.own_layers, strict=True)):
            tensors = {i: x.to(device) for i, x in file.read_group(idx + 1).items()}
            if (entry["kv_heads"], entry["head_dim"]) != (heads, dim):
                raise ValueError(f"its layer {idx} has other heads than the model, {heads} of dimension {dim}")
            if entry["seen_tokens"] != num_tokens:
                raise ValueError(f"its layer {idx} has seen {entry['seen_tokens']} tokens of {num_tokens}")
            _restore_layer(entry, layer, tensors, dtype)
        cache.check_integrity()
    except (KeyError, TypeError, ValueError, AttributeError, IntegrityError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise _damaged(file, what[:300]) from None


def _restore_layer(
    entry: Mapping[str, Any], layer: LayerCache, tensors: Mapping[int, Tensor], dtype: torch.dtype
) -> None:
    heads, dim, seen, prompt_tokens = (
        _count(entry, name) for name in ("kv_heads", "head_dim", "seen_tokens", "prompt_tokens")
    )
    keys, values = (tensors[i] for i in entry["tail"])
    num_tail = len(keys) // heads
    for x in (keys, values):
        if tuple(x.shape) != (heads * num_tail, dim) or x.dtype != dtype:
            raise ValueError(f"its tail is {x.dtype} {[*x.shape]} and must be {dtype} {[heads * num_tail, dim]}")
    row = Row(prompt_tokens=prompt_tokens)
    if entry["kept"] is not None:
        row.kept = tensors[entry["kept"]].cpu()
        if tuple(row.kept.shape) != (heads, -(-prompt_tokens // 8)) or row.kept.dtype != torch.uint8:
            raise ValueError(f"its bitmap of {heads} heads and {prompt_tokens} tokens is {[*row.kept.shape]}")
        if prompt_tokens > seen or any(
            int(index.max()) >= prompt_tokens for index in unpack_kept(row.kept) if len(index)
        ):
            raise ValueError(f"its bitmap keeps tokens beyond the prompt of {prompt_tokens}")
    for fields in entry["segments"]:
        parts = {name: tensors[i] for name, i in fields["arrays"].items()}
        row.segments.append(build_segment(fields["form"], fields, parts, num_kv_heads=heads, head_dim=dim))
    tail = Tail.of(
        [(keys.reshape(heads, num_tail, dim), values.reshape(heads, num_tail, dim))], layer.policy.residual_tokens
    )
    rope = layer.rope_of(keys.device) if Need.ROPE in layer.policy.needs else None
    writer = SegmentWriter(policy=layer.policy, layer_idx=layer.layer_idx, num_layers=layer.num_layers, rope=rope)
    layer.content = PagedRows([row], tail, writer, layer.reading.shared)
    layer.seen, layer.row_seen, layer.is_initialized = seen, [seen], True
    layer.token_bytes = 2 * heads * dim * dtype.itemsize
    layer.measure()


def _count(entry: Mapping[str, Any], name: str) -> int:
    value = entry[name]
    if type(value) is not int or not (name != "prompt_tokens") <= value < 1 << 31:
        raise ValueError(f"{name} must be a count; got {value!r}")
    return value


def _damaged(file: SavedFile, what: str) -> DamagedFile:
    return DamagedFile(f"{file.path} cannot be opened: {what}.")
